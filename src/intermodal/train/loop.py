"""The one training loop: batches in, a run folder out. Everything that decides the result is in the recipe and the checkpoint."""

from __future__ import annotations

import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..config import to_dict
from ..data.loader import Loader, Mixture, Rejects
from ..data.source import TOLD
from ..data.sprites import HELD_OUT_STYLE
from ..data.stream import StreamSource
from ..errors import IntermodalError
from ..nn.machine import autocast_for
from ..parallel import checkpoint
from ..parallel.setup import World, gradient_norm
from .divergence import ALARM, RECENT, usual
from .metrics import Display, Metrics
from .optim import learning_rate, update_average
from .resume import changes, refuse_changes
from .sources import refuse_cut, within

ROLLBACKS = 5


class Stopped(IntermodalError):
    """The run was asked to stop, saved its state and can go on."""


class NotFinite(IntermodalError):
    """The loss became NaN or infinite."""


class Trainer(ABC):
    """One run of one objective. `run()` is the loop; a subclass says what is trained, on what, and what a step is.

    A subclass's `_set_up` makes `model` (wrapped for its ranks), `optimizer` and `loader`; the recipe has `name`, `data.batch`, `optim`
    and `train`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    judged = "loss"
    """Which logged value tells a divergence."""

    def __init__(self, recipe: Any, folder: Path, world: World, resume: bool, console: Console, quiet: bool):
        self.recipe, self.folder, self.world, self.console, self.quiet = recipe, folder, world, console, quiet
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.resumed_from = checkpoint.latest(folder) if resume else None
        self._claim_folder(resume)
        if self.resumed_from is not None:
            refuse_changes(checkpoint.read_meta(self.resumed_from)["recipe"], recipe, self._fixed, folder)
        self.dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
        """Of the master weights."""
        self.autocast = autocast_for(recipe.train.precision, world.device)
        torch.manual_seed(recipe.train.seed * 1009 + world.rank)
        self._set_up()
        self.average: dict[str, Tensor] | None = None
        if recipe.optim.ema is not None:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.recent: list[float] = []
        """What was judged, of the last logged steps."""
        self.rollbacks, self.went_back_to, self.told_of_divergence = 0, -1, False
        self.step = 0
        if self.resumed_from is not None:
            meta = checkpoint.restore(self.resumed_from, world, self.model, self.optimizer, self.average)
            self.step = meta["step"]
            self.rollbacks, self.went_back_to = meta["rollbacks"], meta["went_back_to"]
            if meta.get("judged", "loss") == self.judged:  # else they are of another scale: of a run of an older version
                self.recent = meta["recent"]
            self._count_on(meta.get("counted", {}))
            self.loader.restore(meta["data"])
            self._tell_of_changes(meta["recipe"])
        if world.main:  # only now: what could not be gone on with is not what the run is made of
            (folder / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
        self.place = self.loader.state()
        """In the data, after the last step: further batches may have been fetched."""
        self.rejected = 0
        """Unusable samples so far, of all ranks."""
        self.saved: tuple[int, dict[str, Any]] | None = None
        """Step and place of the newest checkpoint that this process wrote."""
        self.asked_to_stop: str | None = None
        self.trained = False
        """Whether this process has begun a step: before, there is nothing to save."""

    @abstractmethod
    def _set_up(self) -> None:
        """Make `model`, `optimizer` and `loader`, as they are before the first step."""

    @abstractmethod
    def _train_step(self, fetched: Any, logging: bool) -> dict[str, Any]:
        """Forward, backward, `_update`; the values to log, or nothing when not logging."""

    @abstractmethod
    def _note(self, values: dict[str, Any]) -> str:
        """What the progress line says of the logged values."""

    @abstractmethod
    def _finish(self) -> Any:
        """The trained model, whole, in eval mode, saved by the first rank."""

    def _counted(self) -> dict[str, Any]:
        """What has been counted since the last logged step, on all ranks together: a checkpoint keeps it, so that the log goes on as if
        the run had not stopped."""
        return {}

    def _count_on(self, counted: dict[str, Any]) -> None:
        """Go on from what `_counted` gave; from nothing where a checkpoint kept none."""
        return

    def run(self) -> Any:
        recipe, steps = self.recipe, self.recipe.train.steps
        metrics = self.metrics = Metrics(self.folder, resumed_at=self.step) if self.world.main else None
        display = Display(self.console, recipe.name, self.step, steps, recipe.data.batch, quiet=self.quiet)
        batches = iter(self.loader) if self.step < steps else None
        with self._stop_signals():
            try:
                clock, since = time.perf_counter(), self.step
                every = recipe.train.save_every
                for fetched in self._in_step(batches) if batches is not None else ():
                    self.trained = True
                    saving = self.step + 1 == steps or bool(every and (self.step + 1) % every == 0)
                    # a run that can roll back saves nothing before it has looked at the loss
                    judged = saving and recipe.train.rollback is not None
                    logging = (self.step + 1) % recipe.train.log_every == 0 or self.step + 1 == steps or judged
                    try:
                        values = self._train_step(fetched, logging)
                    except NotFinite as error:
                        if not self._rolled_back(str(error)):
                            raise
                        clock, since = time.perf_counter(), self.step
                        continue
                    self.step += 1
                    if logging:
                        seconds = time.perf_counter() - clock
                        values["samples_per_second"] = (self.step - since) * recipe.data.batch / seconds
                        values["rejects"] = self.rejected
                        clock, since = time.perf_counter(), self.step
                        if metrics is not None:
                            metrics.write(self.step, values)
                        display.step(self.step, self._note(values), values["samples_per_second"])
                        why = self._diverged(values)
                        if why and self._rolled_back(why):
                            clock, since = time.perf_counter(), self.step
                            continue
                        if why and self.world.main and not self.told_of_divergence:
                            self.told_of_divergence = True
                            self._warn(f"{why}; {self._why_not_back()}")
                    if saving:
                        self._save()
            finally:
                if batches is not None:
                    batches.close()  # ends its workers
                display.close()
                if metrics is not None:
                    metrics.close()
        return self._finish()

    def _in_step(self, batches: Iterator[Any]) -> Generator[Any, None, None]:
        """This rank's batches, as long as steps are left, every rank has a batch, and none was asked to stop.

        The ranks agree on it before each step, in one exchange: who went into a step alone would wait for the others for ever.

        Raises:
            Stopped: a rank was asked to stop; all have saved, where a step was trained.
            IntermodalError: a rank's data cannot go on, or the share of rejects of all ranks is past the limit; the same on all ranks.
        """
        first = True  # a run that is asked to stop while it sets up trains a step, so that it has something to save
        while self.step < self.recipe.train.steps:
            stop, fetched, failure = self.asked_to_stop is not None and not first, None, None
            if not stop:
                try:
                    fetched = next(batches)
                except IntermodalError as error:
                    failure = error
            counted = self.loader.rejects
            state = torch.tensor([stop, failure is not None, counted.read, counted.rejected], dtype=torch.float64)
            if self.world.size > 1:
                state = self.world.sum(state.to(self.world.device))
            stops, failures, read, self.rejected = (int(total) for total in state.tolist())
            if failures:
                raise next(error for error in self._of_all_ranks(failure) if error is not None)
            if stops:
                # a step of rejects alone trains nothing: saving then would put moments of a step that never was into the optimizer
                if self.trained and self.saved != (self.step, self.place):
                    self._save()
                raise Stopped(
                    f"stopped at step {self.step} of {self.recipe.train.steps} ({self.asked_to_stop or 'another rank'}), "
                    f"{'saved' if self.trained else 'before it had anything new to save'} in {self.folder}; go on with the same command "
                    f"and --resume"
                )
            if self.world.size > 1 and counted.over(read, self.rejected):
                last = next((reject for reject in self._of_all_ranks(counted.last) if reject is not None), None)
                raise counted.too_many(read, self.rejected, last, self.folder / "rejects*.jsonl")
            self.place = self.loader.state()
            yield fetched
            first = False

    def _of_all_ranks(self, value: Any) -> list[Any]:
        found = [value] * self.world.size
        if self.world.size > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def _diverged(self, values: dict[str, Any]) -> str | None:
        """What is wrong with a logged step: a value far from the usual."""
        value = values[self.judged]
        before = usual(value, self.recent, self.recipe.train.rollback or ALARM)
        if before is not None:
            return f"the {self.judged.replace('_', ' ')} is {value:.3f} at step {self.step}, and was about {before:.3f}"
        self.recent = [*self.recent[1 - RECENT :], value]
        return None

    def _warn(self, what: str) -> None:
        """Tell of something in yellow. Names of files and samples are in it, so that brackets are not markup."""
        self.console.print(what, style="yellow", markup=False)

    def _why_not_back(self) -> str:
        if self.recipe.train.rollback is None:
            return "train.rollback=3 with train.save_every goes back then"
        if self.rollbacks >= ROLLBACKS:
            return f"going back has not helped {ROLLBACKS} times: lower optim.lr, or look at the data"
        return "there is no checkpoint to go back to yet: set train.save_every lower"

    def _rolled_back(self, why: str) -> bool:
        """Go back to the newest checkpoint's weights, or to the one before where going back to the newest has not helped; data goes on
        from here. False where rolling back is off, or has not helped five times."""
        found = checkpoint.whole(self.folder)
        if self.recipe.train.rollback is None or not found or self.rollbacks >= ROLLBACKS:
            return False
        if checkpoint.step_of(found[-1]) == self.went_back_to and len(found) > 1:
            checkpoint.remove(found.pop(), self.world)  # it was saved when the run was already lost
        self.rollbacks += 1
        self.optimizer.zero_grad(set_to_none=True)
        came_to = self.step
        meta = checkpoint.restore(found[-1], self.world, self.model, self.optimizer, self.average)
        self.step = self.went_back_to = meta["step"]
        self._count_on(meta.get("counted", {}))
        if self.world.main:
            assert self.metrics is not None
            self.metrics.back_to(self.step)
            self._warn(f"{why}: back from step {came_to} to {self.step}, past the data between")
            with (self.folder / "rollbacks.jsonl").open("a") as file:
                file.write(json.dumps({"from": came_to, "to": self.step, "why": why}) + "\n")
        return True

    def _loader(self, sources: Sequence[Any], fetcher: Any) -> Loader:
        """This rank's steps of the sources. What of them cannot be read at all (a shard cut short) is told now.

        Raises:
            DataError: too large a share of a source's shards was cut short.
        """
        data, world = self.recipe.data, self.world
        name = "rejects.jsonl" if world.main else f"rejects-{world.rank}.jsonl"
        rejects = Rejects(self.folder / name, data.max_reject_share)
        for source in sources:
            if isinstance(source, StreamSource):
                source.split(*((world.rank, world.size) if data.split_streams else (0, 1)))
            problems = getattr(source, "problems", [])
            for number, (key, reason) in enumerate(problems if world.main else []):
                rejects.note(key, reason)
                if number < TOLD:
                    self._warn(f"{key}: {reason}")
            if world.main and len(problems) > TOLD:
                self._warn(f"... and {len(problems) - TOLD} more of {source.name}, in {rejects.path}")
            refuse_cut(source, problems, data.max_reject_share)
            if world.main and HELD_OUT_STYLE in getattr(getattr(within(source), "config", None), "styles", ()):
                self._warn(
                    f"{source.name} shows {HELD_OUT_STYLE} drawings, the style that the evaluation holds out: its numbers for an "
                    f"unseen style will say nothing"
                )
        return Loader(
            Mixture(sources, data.weights, data.seed),
            fetcher,
            batch=data.batch,
            rank=world.rank,
            ranks=world.size,
            workers=data.workers,
            prefetch=data.prefetch,
            rejects=rejects,
        )

    def _update(self, keys: Sequence[str]) -> tuple[float, Tensor]:
        """Clip, step, average: (the rate, the gradients' norm before clipping).

        Args:
            keys: of this rank's samples, to be named where the gradients are not finite.
        """
        config = self.recipe.optim
        rate = learning_rate(config, self.step, self.recipe.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(parameters)
        if not bool(torch.isfinite(norm)):  # one step by it and every weight is NaN
            raise self._not_finite(f"the norm of the gradients is {norm.item()}, with a finite loss,", keys)
        if config.clip_norm is not None:
            shrink = (config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for parameter in parameters:
                parameter.grad.mul_(shrink.to(parameter.grad.device))  # pyright: ignore[reportOptionalMemberAccess]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            update_average(self.average, self.model, config.ema)
        return rate, norm

    def _check_finite(self, value: Tensor, keys: Sequence[str]) -> None:
        """Raises NotFinite, on every rank, where the value of some rank is not finite; it names the value and the samples of the first."""
        finite = bool(torch.isfinite(value))
        if self.world.any(not finite):
            found = self._of_all_ranks(None if finite else (value.item(), list(keys)))
            rank, (number, samples) = next((rank, one) for rank, one in enumerate(found) if one is not None)
            raise self._not_finite(f"the loss is {number}", samples, rank)

    def _not_finite(self, what: str, keys: Sequence[str], rank: int | None = None) -> NotFinite:
        """An error that names the samples of a rank, this one where none is given; all of them are in a file."""
        rank = self.world.rank if rank is None else rank
        file = self.folder / f"not-finite-{rank}.json"
        if rank == self.world.rank:
            file.write_text(json.dumps({"step": self.step + 1, "what": what, "samples": list(keys)}) + "\n")
        whose = "this rank" if rank == self.world.rank else f"rank {rank}"
        more = f" and {len(keys) - 8} more, all in {file}" if len(keys) > 8 else ""
        return NotFinite(
            f"{what} at step {self.step + 1}; {whose}'s samples: {', '.join(keys[:8]) or 'none'}{more}. {self._before_it()} "
            f"Look at the samples, lower optim.lr, or set train.precision=fp32"
        )

    def _before_it(self) -> str:
        """Where the weights before a step that went wrong are."""
        newest = checkpoint.latest(self.folder)
        return (
            f"The weights before it are in {newest}."
            if newest
            else "Nothing was saved before it (train.save_every saves on the way)."
        )

    def _claim_folder(self, resume: bool) -> None:
        """Refuse to overwrite a run by accident."""
        if not resume and checkpoint.latest(self.folder) is not None:
            raise IntermodalError(f"{self.folder} already holds a run; go on with --resume, or give another --out")
        if resume and self.resumed_from is None:
            raise IntermodalError(f"{self.folder} holds no checkpoint to resume from")
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                for old in self.folder.glob("rejects*.jsonl"):
                    old.unlink()
        if self.world.size > 1:
            torch.distributed.barrier()

    def _fixed(self, name: str) -> bool:
        """Whether a setting, by its dotted path, is the run's from its first step to its last."""
        return name == "optim.name"

    def _tell_of_changes(self, before: dict[str, Any]) -> None:
        """A resumed run may have other settings than it began with, and is then not what it would have been: they are named."""
        changed = changes(before, self.recipe).values()
        if changed and self.world.main and not self.quiet:
            self._warn(f"resumed with other settings: {'; '.join(changed)}")

    def _save(self) -> None:
        judged = {"judged": self.judged, "recent": self.recent, "rollbacks": self.rollbacks, "went_back_to": self.went_back_to}
        meta, keep = {"recipe": to_dict(self.recipe), **judged, "counted": self._counted()}, self.recipe.train.keep
        checkpoint.save(self.folder, self.step, self.world, self.model, self.optimizer, self.average, meta, self.place, keep)
        self.saved = self.step, self.place

    @contextmanager
    def _stop_signals(self):
        """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked_to_stop is not None:
                raise KeyboardInterrupt
            self.asked_to_stop = signal.Signals(number).name

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
