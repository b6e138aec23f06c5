(() => {
  const table = document.querySelector("table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator("en", { numeric: true });

  function sort(head) {
    const place = heads.indexOf(head);
    const text = head.matches(".model, .label");
    const first = text || head.matches(".rank, .amount") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[place].dataset.value;
    body.append(...rows.slice().sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What was not measured is last in either order.
      if (x === "" || y === "") return (x === "") - (y === "");
      // Two infinite distances differ by no number.
      return sign * (text ? collator.compare(x, y) : (x - y || 0));
    }));
  }
  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => sort(head)));

  const search = document.querySelector(".search");
  const filters = [...document.querySelectorAll(".filter")];
  const found = document.querySelector(".found");
  const names = new Map(rows.map((row) => [row, [...row.cells].filter((cell) => cell.matches(".model, .label")).map((cell) => cell.textContent).join(" ").toLowerCase()]));
  const input = search.querySelector("input");
  function narrow() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = filters.map((label) => label.querySelector("select")).filter((select) => select.value);
    let shown = 0;
    rows.forEach((row) => {
      row.hidden = !(words.every((word) => names.get(row).includes(word))
        && wanted.every((select) => row.cells[Number(select.dataset.place)].dataset.value === select.value));
      shown += !row.hidden;
    });
    found.textContent = words.length || wanted.length ? `${shown} of ${rows.length}` : "";
  }
  search.hidden = false;
  input.addEventListener("input", narrow);
  filters.forEach((label) => {
    label.hidden = false;
    label.querySelector("select").addEventListener("change", narrow);
  });
  // A browser that goes back may have kept what was typed.
  narrow();
})();
