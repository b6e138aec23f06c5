"""Square Attack (Andriushchenko et al., arXiv:1912.00049): random search by squares, in L-infinity and L2.

It sees logits alone, no gradients. What happens to an example is decided by its own random numbers: each has its own
squares, which are all drawn before the search begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from robench.catalog import AttackEntry, PositiveInt, Probability
from robench.losses import TOP_1, Criterion
from robench.lp_geometry import per_example, project, steepest
from robench.random_streams import RandomStream
from robench.target import narrowed
from robench.threat_model import ThreatModel

#: Queries after which the share of the image that a square covers is halved, of a budget of 10,000; section 5.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_BUDGET = 10_000
#: So many squares are drawn at a time: few enough to stay in cache, many enough to cost nothing per call.
_SQUARES_PER_DRAW = 500
#: How far an example looks ahead for a square that would change it: so many squares, but not more pixels.
_SQUARES_AHEAD, _PIXELS_AHEAD = 8, 4096


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    random: RandomStream,
    criterion: Criterion = TOP_1,
    queries: PositiveInt = 5000,
    p_init: Probability = 0.8,
    restarts: PositiveInt = 1,
    schedule_queries: PositiveInt = 10_000,
) -> Tensor:
    """Put squares on the image and keep those that raise the margin; Algorithms 1 to 3 of the paper.

    In L-infinity a square that would leave the image as it is (all its pixels are where it would put them) counts as a
    query, as it does in the paper, but the model is not asked: the answer is known.

    Args:
        model: images `(N, C, H, W)` in [0, 1] -> logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` int64.
        threat: norm and radius.
        random: the examples' random numbers (starts and squares).
        criterion: what counts as broken, and the margin that is raised.
        queries: squares that are tried in each restart, after the start point.
        p_init: share of the image's pixels that the first squares cover.
        restarts: independent runs.
        schedule_queries: the budget for which the squares' sizes are made; section 5 of the paper stretches its
            schedule to the budget (`schedule_queries` = `queries`), AutoAttack does not.

    Returns:
        `(N, C, H, W)` in the ball and the box: the first broken image, else that of the largest margin in the last run.
    """
    result = images.detach().clone()
    rows = torch.arange(len(images), device=images.device)
    covered = shares(p_init, queries, schedule_queries)
    begin = Signs.begin if threat.norm == "Linf" else Windows.begin
    for restart in range(restarts):
        if len(rows) == 0:
            break
        search = begin(images[rows], threat, random[rows].at("restart", restart), covered)
        result[rows], standing = _search(narrowed(model, rows), labels[rows], search, criterion)
        rows = rows[standing]
    return result


def shares(p_init: float, queries: int, schedule_queries: int) -> list[float]:
    """Return for each query the share of the image's pixels that its square covers: section 5 of the paper."""
    scale = _SCHEDULE_BUDGET / schedule_queries
    return [p_init / 2 ** sum(int(query * scale) > after for after in _HALVINGS) for query in range(queries)]


def _queries_between_compactions(device: torch.device) -> int:
    """Return how often it is looked at who is done: on an accelerator that makes the host wait."""
    return 1 if device.type == "cpu" else 20


class Search(Protocol):
    """The best points of some examples, and what to try next."""

    def points(self) -> Tensor:
        """Return the best points so far, `(n, C, H, W)`."""
        ...

    def propose(self) -> Tensor:
        """Return one candidate for each example."""
        ...

    def keep(self, better: Tensor) -> None:
        """Make those of the last candidates the best points that `better` `(n,)` marks."""
        ...

    def exhausted(self) -> Tensor:
        """Return who has no query left, `(n,)` bool."""
        ...

    def __getitem__(self, rows: Tensor) -> Search:
        """Return the search of some of the examples."""
        ...


@torch.no_grad()
def _search(model: nn.Module, labels: Tensor, search: Search, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Return the first broken points, else the best ones, and who stands in the end (Algorithm 1)."""
    result = search.points().clone()
    standing = torch.ones_like(labels, dtype=torch.bool)
    rows = torch.arange(len(labels), device=labels.device)
    interval = _queries_between_compactions(labels.device)
    logits = model(result)
    best, fallen = criterion.margin(logits, labels), criterion.broken(logits, labels)
    for turn in itertools.count():
        if turn % interval == 0:
            done = fallen | search.exhausted()
            if bool(done.any()):
                result[rows[done]], standing[rows[done]] = search.points()[done], ~fallen[done]
                keep = (~done).nonzero().squeeze(1)
                if len(keep) == 0:
                    break
                rows, labels, model, search = rows[keep], labels[keep], narrowed(model, keep), search[keep]
                best, fallen = best[keep], fallen[keep]
        # Who is done stays as it is until it leaves.
        going = ~(fallen | search.exhausted())
        logits = model(search.propose())
        margin, broken = criterion.margin(logits, labels), criterion.broken(logits, labels)
        better = ((margin > best) | broken) & going
        search.keep(better)
        best, fallen = torch.where(better, margin, best), fallen | (broken & going)
    return result, standing


@dataclass(frozen=True)
class Draws:
    """All squares of all examples of a search: where they are and what they do, by example and query."""

    sides: tuple[int, int]
    """Height and width of an image."""
    sizes: list[int]
    """Side of the square, by query; they never grow."""
    size: Tensor
    """(Q,) int64: the same, on the device."""
    top: Tensor
    """(N, Q, k) int16: its first row, for each of k squares."""
    left: Tensor
    """(N, Q, k) int16."""
    coins: Tensor
    """(N, Q, b) bool: fair ones."""

    @classmethod
    def of(cls, random: RandomStream, sides: tuple[int, int], sizes: list[int], *, squares: int, coins: int) -> Draws:
        """Draw uniformly among the squares that lie inside the image."""
        size = torch.tensor(sizes, device=random.ids.device)
        count, words = len(random.ids), 2 * squares + -(-coins // 32)
        top, left, flips = [], [], []
        for block, part in enumerate(size.split(_SQUARES_PER_DRAW)):
            drawn = random.at("squares", block).words(len(part) * words).view(count, len(part), words)
            # The upper half of the product of a 32-bit word and a range is uniform in the range.
            top.append((drawn[:, :, :squares] * (sides[0] + 1 - part[:, None]) >> 32).to(torch.int16))
            left.append((drawn[:, :, squares : 2 * squares] * (sides[1] + 1 - part[:, None]) >> 32).to(torch.int16))
            bits = [drawn[:, :, 2 * squares + coin // 32] >> (coin % 32) & 1 for coin in range(coins)]
            flips.append(torch.stack(bits, dim=2).bool())
        return cls(sides, sizes, size, torch.cat(top, 1), torch.cat(left, 1), torch.cat(flips, 1))

    def pixels(self, rows: Tensor, queries: Tensor, *, square: int, room: int) -> Tensor:
        """Return the pixels of squares as positions in the flat image, `(*queries.shape, room^2)` int64.

        `rows` and `queries` broadcast against each other. A square whose side is below `room` has its last row and
        column repeated, so that all have the same number of entries.
        """
        side = torch.arange(room, device=queries.device)
        side = torch.minimum(side, self.size[queries][..., None] - 1)
        down = self.top[rows, queries, square][..., None] + side
        across = self.left[rows, queries, square][..., None] + side
        return (down[..., :, None] * self.sides[1] + across[..., None, :]).flatten(-2)


@dataclass
class Signs:
    """L-infinity (Algorithm 2): each pixel is at the upper or the lower end of what it may be.

    Images are flat here, `(n, C, H W)`: a square is a list of pixels.
    """

    draws: Draws
    radius: float
    rows: Tensor
    """(n,) which of the draws' examples these are."""
    images: Tensor
    best: Tensor
    """The best points."""
    signs: Tensor
    """bool: which of their pixels are at the upper end."""
    query: Tensor
    """(n,) int64: the next one."""
    turn: int
    """How often was asked; nobody's next query is an earlier one."""
    candidates: Tensor
    """The last ones: what `keep` is about."""
    candidates_signs: Tensor

    @classmethod
    def begin(cls, images: Tensor, threat: ThreatModel, random: RandomStream, shares: list[float]) -> Signs:
        """Start with vertical stripes of random sign (section 3.2, "initialization")."""
        count, channels, height, width = images.shape
        # "h <- the nearest integer to sqrt(p w^2)", at least 1 (section 3.2).
        sizes = [min(max(round(math.sqrt(share * height * width)), 1), height, width) for share in shares]
        draws = Draws.of(random, (height, width), sizes, squares=1, coins=channels)
        stripes = random.at("stripes").uniform(images.new_empty(count, channels, 1, width)) < 0.5
        flat, signs = images.flatten(2), stripes.expand(images.shape).flatten(2)
        best, rows = _end(flat, signs, threat.radius), torch.arange(count, device=images.device)
        return cls(draws, threat.radius, rows, flat, best, signs, torch.zeros_like(rows), 0, best, signs)

    def __getitem__(self, rows: Tensor) -> Signs:
        """Return the search of some of the examples."""
        names = ("rows", "images", "best", "signs", "query")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def points(self) -> Tensor:
        """Return the best points so far."""
        return self.best.view(*self.best.shape[:2], *self.draws.sides)

    def exhausted(self) -> Tensor:
        """Return who has no query left."""
        return self.query >= len(self.draws.sizes)

    def propose(self) -> Tensor:
        """Return each example with its next square that changes it; with the last of those ahead, if none does."""
        query, channels = self._next_change(), self.images.shape[1]
        pixels = self.draws.pixels(self.rows, query, square=0, room=self._room())
        pixels = pixels[:, None].expand(-1, channels, -1)
        upper = self.draws.coins[self.rows, query][:, :, None].expand(pixels.shape)
        self.candidates = self.best.scatter(2, pixels, _end(self.images.gather(2, pixels), upper, self.radius))
        self.candidates_signs = self.signs.scatter(2, pixels, upper)
        self.query, self.turn = query + 1, self.turn + 1
        return self.candidates.view(*self.best.shape[:2], *self.draws.sides)

    def keep(self, better: Tensor) -> None:
        """Make the last candidates of these examples their best points."""
        self.best = _replaced(self.best, self.candidates, better)
        self.signs = _replaced(self.signs, self.candidates_signs, better)

    def _room(self) -> int:
        """Return what is at least the side of everybody's next square."""
        return self.draws.sizes[min(self.turn, len(self.draws.sizes) - 1)]

    def _next_change(self) -> Tensor:
        """Return `(n,)` int64: the next query of each example whose square is not there already."""
        last, room = len(self.draws.sizes) - 1, self._room()
        ahead = min(max(_PIXELS_AHEAD // room**2, 1), _SQUARES_AHEAD)
        queries = (self.query[:, None] + torch.arange(ahead, device=self.rows.device)).clamp_max(last)
        pixels = self.draws.pixels(self.rows[:, None], queries, square=0, room=room).flatten(1)
        there = self.signs.gather(2, pixels[:, None].expand(-1, self.signs.shape[1], -1)).unflatten(2, (ahead, -1))
        wanted = self.draws.coins[self.rows[:, None], queries].transpose(1, 2)
        changes = (there != wanted[..., None]).any(3).any(1)
        # Of equal values argmax takes the first.
        skipped = torch.where(changes.any(1), changes.int().argmax(1), ahead - 1)
        return (self.query + skipped).clamp_max(last)


def _end(images: Tensor, upper: Tensor, radius: float) -> Tensor:
    """Return for each pixel the upper or the lower end of what it may be."""
    return torch.where(upper, images + radius, images - radius).clamp(0.0, 1.0)


def _replaced(old: Tensor, new: Tensor, better: Tensor) -> Tensor:
    """Return `old` `(n, ...)` with the rows of `new` that are better; `old` itself may be changed."""
    if better.device.type != "cpu":
        return torch.where(per_example(better, old), new, old)
    rows = better.nonzero().squeeze(1)  # few, which an accelerator's host would have to wait for
    if len(rows):
        old[rows] = new[rows]
    return old


@dataclass
class Windows:
    """L2 (Algorithm 3): a window takes the length of another one, and a new pattern on top of its own."""

    draws: Draws
    threat: ThreatModel
    rows: Tensor
    """(n,) which of the draws' examples these are."""
    images: Tensor
    best: Tensor
    """(n, C, H, W): the best points."""
    patterns: Mapping[int, Tensor]
    """eta by the window's side."""
    query: int
    """The next one."""
    candidates: Tensor
    """The last ones: what `keep` is about."""

    @classmethod
    def begin(cls, images: Tensor, threat: ThreatModel, random: RandomStream, shares: list[float]) -> Windows:
        """Start with a grid of patterns of random sign and orientation (section 3.3, "initialization")."""
        count, channels, height, width = images.shape
        # An odd number of at least 3, so that the window has a centre (section 3.3).
        odd = [max(round(math.sqrt(share * height * width)), 3) | 1 for share in shares]
        sizes = [min(size, height, width) for size in odd]
        draws = Draws.of(random, (height, width), sizes, squares=2, coins=channels + 1)
        start = project(images + threat.radius * steepest(_grid(images, random), "L2"), images, threat)
        patterns = {size: eta(size).to(images) for size in set(sizes)}
        rows = torch.arange(count, device=images.device)
        return cls(draws, threat, rows, images, start, patterns, 0, start)

    def __getitem__(self, rows: Tensor) -> Windows:
        """Return the search of some of the examples."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("rows", "images", "best")})

    def points(self) -> Tensor:
        """Return the best points so far."""
        return self.best

    def exhausted(self) -> Tensor:
        """Return who has no query left."""
        return torch.full_like(self.rows, self.query >= len(self.draws.sizes), dtype=torch.bool)

    def propose(self) -> Tensor:
        """Return each example with its next window (Algorithm 3)."""
        now = min(self.query, len(self.draws.sizes) - 1)
        size, query = self.draws.sizes[now], torch.full_like(self.rows, now)
        offset = (self.best - self.images).flatten(2)
        here, there = (
            self.draws.pixels(self.rows, query, square=k, room=size)[:, None].expand(-1, offset.shape[1], -1)
            for k in (0, 1)
        )
        union = torch.zeros_like(offset).scatter(2, here, 1.0).scatter(2, there, 1.0)
        unused = (self.threat.radius**2 - offset.square().sum((1, 2))).clamp_min(0.0)
        available = ((offset * union).square().sum(2) + unused[:, None] / offset.shape[1]).sqrt()
        coins = self.draws.coins[self.rows, query][:, :, None, None]
        pattern = self.patterns[size]
        pattern = torch.where(coins[:, :1], pattern, pattern.T)
        pattern = torch.where(coins[:, 1:], pattern, -pattern).flatten(2)
        new = _unit(pattern + _unit(offset.gather(2, here))) * available[:, :, None]
        moved = offset.scatter(2, there, 0.0).scatter(2, here, new).view(self.images.shape)
        self.candidates = project(self.images + moved, self.images, self.threat)
        self.query += 1
        return self.candidates

    def keep(self, better: Tensor) -> None:
        """Make the last candidates of these examples their best points."""
        self.best = _replaced(self.best, self.candidates, better)


def _unit(values: Tensor) -> Tensor:
    """Return each row of `(n, C, d)` with length 1, and a row of zeros as it is."""
    length: Tensor = values.norm(dim=2, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return values / length


def eta(size: int) -> Tensor:
    """Return the pattern of length 1, `(size, size)` float64: a pyramid and a negative one below it (equation 2)."""
    pattern = torch.zeros(size, size, dtype=torch.float64)
    half = size // 2
    pattern[:half] = _pyramid(half, size)
    pattern[half:] = -_pyramid(size - half, size)
    length: Tensor = pattern.norm()
    return pattern / length


def _pyramid(height: int, width: int) -> Tensor:
    """Return eta^(width, height) of equation (2): sums of 1/k^2 from the distance to the centre to the border."""
    reach = width // 2
    down, across = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    away = torch.maximum(down.abs()[:, None], across.abs()[None])
    # Entry d is the sum over k = d+1 ... reach+1.
    tails = (1.0 / torch.arange(1, reach + 2, dtype=torch.float64).square()).flip(0).cumsum(0).flip(0)
    return tails[away]


def _grid(images: Tensor, random: RandomStream) -> Tensor:
    """Return `images.shape`: a grid of five by five patterns (in an image that is as wide as it is high)."""
    count, channels, height, width = images.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    plus = random.at("signs").uniform(images.new_empty(count, channels, down, across)) < 0.5
    turned = random.at("turns").uniform(images.new_empty(count, 1, down, across)) < 0.5
    pattern = eta(side).to(images)
    tiles = torch.where(turned[..., None, None], pattern.T, pattern)
    tiles = torch.where(plus[..., None, None], tiles, -tiles)
    grid = tiles.transpose(3, 4).reshape(count, channels, down * side, across * side)
    before = (height - down * side) // 2, (width - across * side) // 2
    after = height - down * side - before[0], width - across * side - before[1]
    return nn.functional.pad(grid, (before[1], after[1], before[0], after[0]))


ENTRY = AttackEntry(
    name="square",
    attack=square,
    summary="random search by squares, which sees logits alone",
    source="Andriushchenko et al., arXiv:1912.00049, Algorithms 1 to 3",
    version=2,
    passes="0",
    queries="queries * restarts",
    norms=("Linf", "L2"),
)
