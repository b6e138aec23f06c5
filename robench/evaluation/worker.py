"""One device with one model and one data set on it: attacks shards, verifies what comes back, counts what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench import catalog
from robench.backends import NATIVE, attack_of
from robench.classifier import Classifier, frozen, give_back_buffers, search_copy, tensor_float32
from robench.compilation import compiled
from robench.datasets import ImageSet
from robench.errors import RobenchError
from robench.evaluation.adversarials import Misclassified
from robench.evaluation.deadline import Deadline, OutOfTime, Pace
from robench.evaluation.judging import Answer, Judge
from robench.evaluation.shards import Batch, InvalidAnswer, Shard, ShardResult
from robench.evaluation.training_moments import TrainingMoments
from robench.evaluation.verification import rules_of
from robench.losses import Criterion, rank_of
from robench.lp_geometry import distance
from robench.random_streams import RandomStream
from robench.records import Cost, EvalSpec, Precision, ShardError
from robench.target import Ledger, Target

#: Batch sizes that are tried for speed on an accelerator; a larger one must be faster than the best so far by this
#: factor to be taken.
_CANDIDATE_SIZES = (32, 64, 128, 256, 512, 1024, 2048)
_WORTHWHILE = 0.97
#: On a CPU speed hardly depends on the batch size from 64 images on, and a trial could cost more than it gains: the
#: largest batch is taken whose activations fit in so many bytes. Gradients and work space, several times as much, come
#: on top.
_CPU_BATCHES = 64, 512
_CPU_ACTIVATIONS = 2**26

#: Where the search copy and the judge may disagree is looked for in such a share of the batch at a time.
_NARROWEST_SHARE = 8


class Worker:
    """Answers shards of questions about one model and one split."""

    def __init__(
        self,
        model: Classifier,
        images: ImageSet,
        *,
        device: torch.device,
        precision: Precision,
        batch_size: int | None = None,
        keep_adversarials: Misclassified | None = None,
        training: Callable[[], ImageSet] | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """Place the model and, where it fits in memory, the split on the device.

        Args:
            model: the plain model, which judges; a folded and frozen copy of it is searched.
            images: the whole split; shards name its positions.
            device: where everything runs.
            precision: of the search. The judge is fp32, or fp64 where the search is fp64.
            batch_size: None finds one by trial.
            keep_adversarials: return the images with the outcomes, those of examples that are wrong without an attack
                left as they are, or attacked, too: nothing but their images tells.
            training: opens the training split, for attacks that ask for its moments.
            deadline: when to stop, in the middle of a shard if need be.
        """
        self.device, self.images = device, images
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        plain = copy.deepcopy(model).to(device=device, dtype=self.dtype)
        self.judge = Judge(plain, num_classes=len(images.classes))
        self._model, self._precision = model, precision
        self._plain_search = search_copy(model, precision=precision, device=device)
        self.search: torch.nn.Module = self._plain_search
        self.allow_tf32 = precision == "tf32"
        self.coarse = precision in {"tf32", "bf16"}
        self.batch_size = batch_size
        self.keep_adversarials = keep_adversarials
        self.training_moments = TrainingMoments(training, device)
        self.deadline = deadline
        self._pace: tuple[str, Pace | None] = ("", None)
        self._resident = torch.from_numpy(images.read(np.arange(len(images)))).to(device) if images.in_memory else None

    def compile_search(self) -> None:
        """Search through torch.compile from now on; raise UserError where that does not work."""
        # The compiler knows no layers but torch's own.
        self._plain_search = search_copy(self._model, precision=self._precision, device=self.device, cheap_layers=False)
        self.search = compiled(self._plain_search, input_shape=self.images.image_shape, device=self.device)

    def punctual(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a model that raises OutOfTime when the time is up; the model itself where there is time enough."""
        return _Punctual(model, self.deadline) if self.deadline else model

    def load(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return `(N, C, H, W)` images in [0, 1] and `(N,)` labels of these positions, on the device."""
        if self._resident is not None:
            images = self._resident[torch.from_numpy(ids).to(self.device)]
        else:
            images = torch.from_numpy(self.images.read(ids)).to(self.device)
        return images.to(self.dtype) / 255, torch.from_numpy(self.images.labels[ids]).to(self.device)

    def __call__(self, shard: Shard) -> ShardResult:
        """Answer one shard; an attack that fails gives an error instead of rows, never a robust example."""
        started = time.perf_counter()
        ledgers: list[Ledger] = []
        parts: list[dict[str, NDArray[Any]]] = []
        kept: list[NDArray[Any]] = []
        pace = self._pace_of(shard.spec)
        try:
            for batch in self._batches(shard, pace):
                if pace:
                    pace.begin()
                rows, adversarial = self._answer_within_memory(shard.spec, batch, ledgers)
                parts.append(rows)
                if self.keep_adversarials:
                    kept.append(adversarial.cpu().numpy())
                if pace:
                    pace.end(len(batch.ids))
        except OutOfTime:
            pass  # the batches before are answers
        except InvalidAnswer as problem:
            error = ShardError(
                first_id=int(shard.ids[0]), count=len(shard.ids), kind=problem.kind, message=str(problem)
            )
            return ShardResult(shard, {}, _cost(ledgers, started), error)
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        found = np.concatenate(kept) if kept else None
        notes = frozenset(note for ledger in ledgers for note in ledger.notes)
        give_back_buffers()
        return ShardResult(shard, rows, _cost(ledgers, started), None, found, notes)

    def _pace_of(self, spec: EvalSpec) -> Pace | None:
        """Return the pace of this question, kept from shard to shard; None where there is time enough."""
        if self._pace[0] != spec.identity:
            self._pace = spec.identity, Pace(self.deadline) if self.deadline else None
        return self._pace[1]

    def _batches(self, shard: Shard, pace: Pace | None) -> Iterator[Batch]:
        """Yield the shard's batches; those of a streamed split are read while the one before is computed."""
        pieces = self._pieces(shard, pace)
        if self._resident is not None:
            yield from (Batch(piece, *self.load(piece)) for piece in pieces)
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            piece = next(pieces, None)
            ahead = None if piece is None else reader.submit(self.load, piece)
            while piece is not None and ahead is not None:
                batch = Batch(piece, *ahead.result())
                piece = next(pieces, None)
                ahead = None if piece is None else reader.submit(self.load, piece)
                yield batch

    def _pieces(self, shard: Shard, pace: Pace | None) -> Iterator[NDArray[np.int64]]:
        """Cut the shard's examples into batches, as large as memory and time allow; end early where time is up."""
        if self.batch_size is None:
            on_cpu = self.device.type == "cpu"
            self.batch_size = self._largest_batch_size(shard.ids) if on_cpu else self._fastest_batch_size(shard.ids)
        start = 0
        while start < len(shard.ids):
            size = pace.largest(self.batch_size) if pace else self.batch_size
            if size == 0:
                return
            yield shard.ids[start : start + size]
            start += size

    def _answer_within_memory(
        self, spec: EvalSpec, batch: Batch, ledgers: list[Ledger]
    ) -> tuple[dict[str, NDArray[Any]], Tensor]:
        """Answer a batch; where memory runs out, answer its halves, and keep to the smaller size from then on."""
        count = len(batch.ids)
        ledgers.append(Ledger.of(count, self.device))
        try:
            return self._answer(spec, batch, ledgers[-1])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if count == 1:
                raise InvalidAnswer("crash", f"one example does not fit in memory: {error}") from error
        torch.cuda.empty_cache()
        self.batch_size = count // 2
        first, first_images = self._answer_within_memory(spec, batch.part(0, count // 2), ledgers)
        second, second_images = self._answer_within_memory(spec, batch.part(count // 2, count), ledgers)
        rows = {name: np.concatenate([first[name], second[name]]) for name in first}
        return rows, torch.cat([first_images, second_images])

    def _answer(self, spec: EvalSpec, batch: Batch, ledger: Ledger) -> tuple[dict[str, NDArray[Any]], Tensor]:
        ids, images, labels = batch
        random = RandomStream(spec.seed, torch.from_numpy(ids).to(self.device))
        clean_prediction, clean_rank = self.judge.of_clean(spec, batch, random)
        right = clean_rank < spec.decision.top_k
        attacked = torch.from_numpy(right).to(self.device).nonzero().squeeze(1)
        adversarial = images.clone()
        prediction = torch.from_numpy(clean_prediction.copy()).to(self.device)  # which is written to below
        rank = torch.from_numpy(clean_rank.copy()).to(self.device)
        if len(attacked):
            found, scores = self._attack(spec, batch, rows=attacked, ledger=ledger, random=random)
            adversarial[attacked], prediction[attacked] = found, scores.argmax(1)
            rank[attacked] = rank_of(scores, labels[attacked])
        difference = adversarial.double() - images.double()
        length = {norm: distance(difference, norm) for norm in ("Linf", "L2")}
        broken = rank >= spec.decision.top_k
        fallen = broken & rules_of(spec).counts(difference)
        robust = ~fallen.cpu().numpy() & right
        size = distance(images.double(), "L2")
        answer = Answer(adversarial, labels, broken)
        rows: dict[str, NDArray[Any]] = {
            "example_id": ids,
            "label": labels.cpu().numpy(),
            "clean_prediction": clean_prediction,
            "clean_rank": clean_rank,
            "adversarial_prediction": prediction.cpu().numpy(),
            "adversarial_rank": rank.cpu().numpy(),
            "attacked": right,
            "broken": broken.cpu().numpy(),
            "robust": robust,
            "linf": length["Linf"].cpu().numpy(),
            "l2": length["L2"].cpu().numpy(),
            "relative_l2": (length["L2"] / torch.where(size > 0, size, 1.0)).cpu().numpy(),
            "broken_in_8_bit": self.judge.broken_in_8_bit(spec, answer, random).cpu().numpy(),
            "wrong_decisions": self.judge.wrong_decisions(spec, answer, attacked, random).cpu().numpy(),
            "broken_by": np.where(broken.cpu().numpy(), np.array(ledger.broken_by, dtype=np.str_), ""),
            **_passes_of(ledger),
        }
        if self.keep_adversarials == "attacked" and not right.all():
            others = torch.from_numpy(~right).to(self.device).nonzero().squeeze(1)
            uncounted = Ledger.of(len(ids), self.device)
            adversarial[others] = self._attack(spec, batch, rows=others, ledger=uncounted, random=random)[0]
        return rows, adversarial

    def _attack(
        self, spec: EvalSpec, batch: Batch, *, rows: Tensor, ledger: Ledger, random: RandomStream
    ) -> tuple[Tensor, Tensor]:
        """Return adversarial images for `rows`, valid ones, and the judge's scores of them."""
        _, images, labels = batch
        plugin = catalog.find("attacks", spec.attack.entry)
        attack, draws = attack_of(spec.attack, spec.threat.norm), random.at(spec.attack.entry)
        rules, criterion = rules_of(spec), Criterion(spec.decision.top_k)
        offered = {"criterion": criterion, "training_moments": self.training_moments}
        wanted = plugin.supplied if spec.attack.library == NATIVE else ()
        supplied = {name: value for name, value in offered.items() if name in wanted}

        def search(model: torch.nn.Module, some: Tensor) -> Tensor:
            clean = images[some]
            try:
                with tensor_float32(allowed=self.allow_tf32 and model is self.search):
                    found = attack(
                        Target(self.punctual(model), ledger)[some],
                        clean,
                        labels[some],
                        threat=spec.threat,
                        random=draws[some],
                        **supplied,
                        **spec.attack.parameters,
                    )
            except RobenchError:
                raise
            except Exception as error:
                if _is_out_of_memory(error):
                    raise
                raise InvalidAnswer("crash", f"{type(error).__name__}: {error}") from error
            if violation := rules.violation(found, clean):
                raise InvalidAnswer(*violation)
            adversarial: Tensor = found.detach()
            return adversarial

        adversarial = search(self.search, rows)
        scores = self.judge.scores(spec.decision, adversarial, random[rows].at("judge"))
        if not spec.decision.plain:
            return adversarial, scores
        # Where the searched copy (folded, perhaps in low precision) believes it fell and the judge does not, the search
        # may have stopped too early: those few are searched again on the judge itself.
        again = self._disputed(adversarial, labels[rows], scores, criterion, ledger=ledger)
        if len(again):
            with frozen(self.judge.model):
                adversarial[again] = search(self.judge.model, rows[again])
            scores[again] = self.judge.scores(spec.decision, adversarial[again], random[rows[again]].at("judge"))
        return adversarial, scores

    @torch.no_grad()
    def _disputed(
        self, adversarial: Tensor, labels: Tensor, logits: Tensor, criterion: Criterion, *, ledger: Ledger
    ) -> Tensor:
        """Return the rows that stand for the judge, whose logits are given, and that the search copy believes broken.

        The two differ by rounding, so it is looked at where the judge's margin is narrowest, and further only as long
        as any such row is found: mostly an eighth of a forward pass.
        """
        narrowest = criterion.margin(logits, labels).argsort(descending=True)
        standing = narrowest[~criterion.broken(logits[narrowest], labels[narrowest])]
        disputed = [standing[:0]]
        parts = 1 if self.coarse else _NARROWEST_SHARE
        for rows in standing.split(max(1, -(-len(standing) // parts))) if len(standing) else ():
            ledger.second_looks += len(rows)
            believed = criterion.broken(self.search(adversarial[rows]), labels[rows])
            disputed.append(rows[believed])
            if len(disputed[-1]) == 0:
                break
        return torch.cat(disputed)

    def _largest_batch_size(self, ids: NDArray[np.int64]) -> int:
        """Return how many images' activations fit in the CPU's share of memory; one image is run to know."""
        image, _ = self.load(ids[:1])

        def kept(count: int) -> int:
            """Return the bytes that a forward pass keeps for the backward pass, weights included."""
            sizes: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                sizes[tensor.data_ptr()] = tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                self._plain_search(image.repeat(count, 1, 1, 1).requires_grad_())
            return sum(sizes.values())

        per_image = max(1, kept(2) - kept(1))
        smallest, largest = _CPU_BATCHES
        return min(largest, max(smallest, _CPU_ACTIVATIONS // per_image))

    def _fastest_batch_size(self, ids: NDArray[np.int64]) -> int:
        """Time one gradient at growing batch sizes; stop where larger ones are no faster per image or do not fit."""
        best, best_time = min(len(ids), _CANDIDATE_SIZES[0]), float("inf")
        for size in _CANDIDATE_SIZES:
            if size > len(ids):
                break
            images, labels = self.load(ids[:size])
            try:
                self._gradient(images[: size // 2], labels[: size // 2])  # warm-up: memory, kernels
                seconds = self._gradient(images, labels) / size
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                break
            if seconds > best_time * _WORTHWHILE:
                break
            best, best_time = size, seconds
        return best

    def _gradient(self, images: Tensor, labels: Tensor) -> float:
        """Return the seconds that one forward and backward pass take."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        images = images.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.search(images), labels)
        torch.autograd.grad(loss, images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


class _Punctual(torch.nn.Module):
    """A model that answers until the time is up: where an attack takes long, it ends in the middle."""

    def __init__(self, model: torch.nn.Module, deadline: Deadline) -> None:
        super().__init__()
        self.model, self.deadline = model, deadline
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        self.deadline.check()
        logits: Tensor = self.model(images)
        return logits


def _passes_of(ledger: Ledger) -> dict[str, NDArray[Any]]:
    """Return the passes of each example; -1 where the attack did not say for which examples it made its passes."""
    if ledger.unattributed != (0, 0):
        unknown = np.full(len(ledger.forward_passes), -1)
        return {"forward_passes": unknown, "backward_passes": unknown}
    return {
        "forward_passes": ledger.forward_passes.cpu().numpy(),
        "backward_passes": ledger.backward_passes.cpu().numpy(),
    }


def _cost(ledgers: list[Ledger], started: float) -> Cost:
    return Cost(
        forward_passes=sum(
            int(book.forward_passes.sum()) + book.unattributed[0] + book.second_looks for book in ledgers
        ),
        backward_passes=sum(int(book.backward_passes.sum()) + book.unattributed[1] for book in ledgers),
        seconds=time.perf_counter() - started,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
