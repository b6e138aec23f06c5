(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const labels = new Uint16Array(bytes(data.labels).buffer);
  const ids = data.ids === null ? null : new Uint32Array(bytes(data.ids).buffer);
  const masks = new Map();
  const mask = (model, kind) => {
    const key = kind + model;
    if (!masks.has(key)) masks.set(key, bytes(data.models[model][kind]));
    return masks.get(key);
  };
  const has = (bits, i) => (bits[i >> 3] >> (i & 7)) & 1;
  const idOf = (i) => (ids ? ids[i] : i);
  const className = (label) => data.classes[label] ?? String(label);
  const percent = (value, n) => (n ? (100 * value / n).toFixed(n >= 5000 ? 2 : 1) : "–");
  const number = (value) => value.toLocaleString("en");

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // Two-sided exact McNemar test: the binomial distribution of the examples that one of the two gets right alone.
  function mcnemar(b, c) {
    const n = b + c;
    let logTerm = -n * Math.LN2;
    let total = 0;
    for (let k = 0; k <= Math.min(b, c); k++) {
      total += Math.exp(logTerm);
      logTerm += Math.log((n - k) / (k + 1));
    }
    return Math.min(1, 2 * total);
  }

  function fill(id, heads, rows) {
    const table = get(id).querySelector("table");
    const head = element("tr");
    heads.forEach((text, i) => head.append(element("th", text, { scope: "col", ...(i ? { class: "share" } : {}) })));
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...rows.map(([name, ...cells]) => {
      const row = element("tr");
      row.append(element("th", name, { scope: "row" }));
      cells.forEach((cell) => {
        const made = element("td");
        made.append(...[cell].flat());
        row.append(made);
      });
      return row;
    }));
    get(id).hidden = false;
  }

  // A bar to the side of the better model, over the largest difference of the table.
  function difference(value, largest) {
    const points = Math.abs(value) < 0.05 ? "0.0" : `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(1)}`;
    const bar = element("i", undefined, { class: `gap ${value > 0 ? "one" : "two"}`, "aria-hidden": "true" });
    bar.style.setProperty("--gap", `${50 * Math.abs(value) / Math.max(largest, 1)}%`);
    const box = element("span", undefined, { class: "gapbox", "aria-hidden": "true" });
    box.append(bar);
    return [box, ` ${points}`];
  }

  function share(cell) {
    return cell ? [cell[1], element("span", cell[2], { class: "interval" })] : "–";
  }

  function show(side, name, alone) {
    get(`${side}-title`).textContent = `Only ${name} is right: ${number(alone.length)}`;
    const pictured = alone.filter((i) => data.pictures[idOf(i)]).slice(0, 48);
    get(`${side}-alone`).replaceChildren(...pictured.map((i) => {
      const item = element("li");
      const figure = element("figure");
      const said = `${className(labels[i])}`;
      figure.append(
        element("img", undefined, { src: data.pictures[idOf(i)], alt: `Example ${idOf(i)}, ${said}`, width: 56, height: 56 }),
        element("figcaption", `${idOf(i)} · ${said}`),
      );
      item.append(figure);
      return item;
    }));
    const shown = new Set(pictured);
    const rest = alone.filter((i) => !shown.has(i));
    const listed = rest.slice(0, 200).map(idOf).join(", ");
    get(`${side}-rest`).textContent = rest.length
      ? `${pictured.length ? "Further examples" : "Examples"}, by number: ${listed}${rest.length > 200 ? ` and ${number(rest.length - 200)} more` : ""}.`
      : "";
  }

  function render() {
    const [first, second] = [Number(get("first").value), Number(get("second").value)];
    const [one, two] = [data.models[first], data.models[second]];
    const standing = [mask(first, "standing"), mask(second, "standing")];
    const clean = [mask(first, "clean"), mask(second, "clean")];
    const alone = [[], []];
    let both = 0;
    const classes = new Map();
    for (let i = 0; i < data.count; i++) {
      const right = [has(standing[0], i), has(standing[1], i)];
      if (right[0] && right[1]) both++;
      else if (right[0]) alone[0].push(i);
      else if (right[1]) alone[1].push(i);
      if (!classes.has(labels[i])) classes.set(labels[i], [0, 0, 0, 0, 0]);
      const own = classes.get(labels[i]);
      own[0]++;
      own[1] += has(clean[0], i);
      own[2] += has(clean[1], i);
      own[3] += right[0];
      own[4] += right[1];
    }
    const p = mcnemar(alone[0].length, alone[1].length);
    const together = one.group !== null && two.group !== null
      ? (one.group.split(" ").some((letter) => two.group.split(" ").includes(letter))
        ? "The table, which corrects for all its pairs, does not take them apart."
        : "The table, which corrects for all its pairs, takes them apart, too.")
      : "";
    const facts = element("dl", undefined, { class: "facts" });
    [
      ["Both right", both],
      [`Only ${one.name}`, alone[0].length],
      [`Only ${two.name}`, alone[1].length],
      ["Neither", data.count - both - alone[0].length - alone[1].length],
    ].forEach(([title, value]) => {
      const box = element("div");
      box.append(element("dt", title), element("dd", `${number(value)} `));
      box.lastChild.append(element("span", `${percent(value, data.count)} %`, { class: "muted" }));
      facts.append(box);
    });
    const told = p < 1e-4 ? "p < 0.0001" : `p = ${p.toPrecision(2)}`;
    const apart = p <= 0.05
      ? `By themselves the two differ (exact McNemar test, ${told}).`
      : `The images do not take the two apart (exact McNemar test, ${told}).`;
    get("answer").replaceChildren(facts, element("p", p <= 0.05 ? `${apart} ${together}` : apart));
    const notes = [one, two].filter((model) => model.note).map((model) => `${model.name}: ${model.note}.`);
    get("caution").textContent = notes.length ? `${notes.join(" ")} Fewer attacks make an easier test.` : "";
    get("caution").hidden = !notes.length;

    const gaps = data.columns.map((_, i) => one.shares[i] && two.shares[i] ? 100 * (one.shares[i][0] - two.shares[i][0]) : null);
    const widest = Math.max(...gaps.map((gap) => Math.abs(gap ?? 0)));
    fill("shares", ["Accuracy, %", one.name, two.name, "Difference"], data.columns.map((title, i) => {
      const cells = [one.shares[i], two.shares[i]];
      return [title, share(cells[0]), share(cells[1]), gaps[i] === null ? "–" : difference(gaps[i], widest)];
    }));
    const byClass = [...classes].sort((a, b) => a[0] - b[0]);
    const most = Math.max(...byClass.map(([, [n, , , x, y]]) => Math.abs(100 * (x - y) / n)));
    fill("classes", ["Class", "Images", `${one.name}, clean %`, `${two.name}, clean %`, `${one.name}, ${data.columns[0].toLowerCase()} %`, `${two.name}, ${data.columns[0].toLowerCase()} %`, "Difference"],
      byClass.map(([label, [n, a, b, x, y]]) => [className(label), number(n), percent(a, n), percent(b, n), percent(x, n), percent(y, n), difference(100 * (x - y) / n, most)]));
    show("first", one.name, alone[0]);
    show("second", two.name, alone[1]);
    get("missing").textContent = data.missing ?? "";
    get("images").hidden = false;
    document.title = `${one.name} and ${two.name} · robench`;
    history.replaceState(null, "", `#${encodeURIComponent(one.name)}&${encodeURIComponent(two.name)}`);
  }

  function choose() {
    const names = location.hash.slice(1).split("&").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
    const places = names.map((name) => data.models.findIndex((model) => model.name === name));
    get("first").value = places[0] >= 0 ? places[0] : 0;
    get("second").value = places[1] >= 0 ? places[1] : 1;
    render();
  }

  for (const side of ["first", "second"]) {
    get(side).append(...data.models.map((model, i) => element("option", model.name, { value: i })));
    get(side).addEventListener("change", render);
  }
  get("swap").addEventListener("click", () => {
    [get("first").value, get("second").value] = [get("second").value, get("first").value];
    render();
  });
  window.addEventListener("hashchange", choose);
  get("pair").hidden = false;
  choose();
})();
