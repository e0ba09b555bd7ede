"""The training loop: a small `transformers.Trainer` that sums terms, stops before harm, and saves whole checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from excise import files, optimise, ranks, recipe
from excise.errors import IntegrityFailed, TrainingStopped
from excise.forward import POLICY, Anatomy, Batch, Product, Step, base_side, passes
from excise.objectives.term import Dual, Ramp, Term
from excise.objectives.value import arguments, free, gather, value_of, weights_of
from excise.schedule import Plan
from excise.shaped import Shape

#: Where a checkpoint keeps constants that were taken again.
RETAKEN = "constants.safetensors"
Collate = Callable[[str, Sequence[int]], Batch]


class _Micro(Dataset):
    """Micro-batches by number; the rows come from the plan, the tensors from ``collate``."""

    def __init__(self, plan: Plan, collate: Collate, rank: int, world: int) -> None:
        self.plan, self.collate, self.rank, self.world = plan, collate, rank, world

    def __len__(self) -> int:
        return self.plan.micro_steps

    def __getitem__(self, micro: int) -> dict[str, Any]:
        sides = {}
        for side, draw in self.plan.draw(micro, self.rank, self.world).items():
            batch = self.collate(side, draw.indices)
            columns = {**batch.columns, "row_weight": torch.tensor(draw.weights)}
            sides[side] = replace(batch, indices=draw.indices, columns=columns)
        return {"micro": micro, "sides": sides}


def _only(items: list[dict]) -> dict:
    return items[0]


def _present(term: Term, sides: Mapping[str, Batch], *, first: bool) -> bool:
    """Whether a micro-batch has a part in the term: its sides are there, or it is the step's first."""
    if term.over is None:
        return first
    return all(base_side(p.side) in (None, *sides) for p in term.needs())


def freeze_unread(model: nn.Module, anatomy: Anatomy, needs: Sequence[Product]) -> None:
    """Freeze what no term reaches: blocks above the highest layer read, and then the final norm and the head."""
    if any(p.what == "lora" for p in needs):  # adapter factors are read at every depth
        return
    highest = 0
    for (_, model_read), wanted in passes(needs).items():
        if model_read != POLICY:
            continue
        if wanted.head:
            return
        layers = [*wanted.layers, *(j for js in wanted.views.values() for j in js)]
        highest = max([highest, *(anatomy.layer(j) for j in layers)])
    tied = getattr(anatomy.head, "weight", None) is model.get_input_embeddings().weight  # type: ignore[operator]
    norm = [] if anatomy.norm is None else [anatomy.norm]
    above = [*anatomy.blocks[highest:], *norm] if highest < anatomy.depth else []
    for module in [*above, *([] if tied else [anatomy.head])]:  # nothing is thawed: an adapter's base stays frozen
        module.requires_grad_(False)


class UnlearnTrainer(Trainer):
    """Sum of terms over paired sides, averaged over the accumulation window and all ranks.

    Args:
        model: The model, adapters attached.
        terms: The objective.
        plan: Which rows each micro-batch reads.
        collate: ``collate(side, indices)`` makes a batch.
        settings: The recipe (optimiser, seed, logging, checkpoints).
        out: Folder for checkpoints.
        reference: Looks up stored products of the original model.
        constants: Tensors that are fixed for the run, or ``{module name: tensor}``.
        precision: ``fp32`` or ``bf16-mixed`` (or ``bf16`` weights, without autocast).
        should_stop: Called after each step with its number; true ends the run.
        beside: Called with the folder of a checkpoint before it is sealed: writes what else has to survive.
        shapes: Parameter's name -> the shape of its updates.
        retake: Called after each step with its number: the constants that are to be others from then on, by name.
        callbacks: Any callbacks of transformers.
    """

    # Terms are divided by the count of rows in the whole window: the loss needs no scaling by accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        plan: Plan,
        collate: Collate,
        settings: recipe.Recipe,
        out: Path,
        *,
        reference: Callable[[Product, Batch], Any] | None = None,
        constants: Mapping[str, Any] | None = None,
        precision: str = "fp32",
        should_stop: Callable[[int], bool] | None = None,
        beside: Callable[[Path], None] | None = None,
        shapes: Mapping[str, Shape] | None = None,
        retake: Callable[[int], Mapping[str, Mapping[str, Tensor]]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.terms, self.plan, self.collate_side, self.settings = list(terms), plan, collate, settings
        self.reference, self.constants, self.should_stop = reference, dict(constants or {}), should_stop
        self.precision, self.retake = precision, retake
        self.beside, self.shapes = beside, shapes
        self.retaken: dict[str, Mapping[str, Tensor]] = {}
        self.anatomy = Anatomy.of(model)
        freeze_unread(model, self.anatomy, [p for t in self.terms for p in t.needs()])
        self.duals = {t.name: t.weight.start for t in self.terms if isinstance(t.weight, Dual)}
        self._window: dict[str, float] = {}
        self._monitor: dict[str, float] = {}
        every = settings.checkpoint_every
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=plan.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings.schedule.accumulate,
            max_grad_norm=settings.optimiser.clip,
            bf16=precision == "bf16-mixed",
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="steps" if every else "no",
            save_steps=every or 500,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **({"activation_checkpointing": True} if settings.model.gradient_checkpointing else {}),
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            label_names=[],
        )
        super().__init__(model=model, args=arguments, callbacks=list(callbacks))
        self.constants = {name: _on(value, self.args.device) for name, value in self.constants.items()}
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The plan's micro-batches, this rank's rows only; not sharded again by accelerate."""
        data = _Micro(self.plan, self.collate_side, self.args.process_index, self.args.world_size)
        return DataLoader(data, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The window's micro-batches, each with the window's totals of rows and label tokens over all ranks.

        The first of them is marked: what counts once per step is counted there.
        """
        samples: list[dict] = []
        while len(samples) < num_batches and (sample := next(epoch_iterator, None)) is not None:
            samples.append(sample)
        totals: dict[str, list[float]] = {side: [0.0, 0.0] for side in sorted(self.plan.rows)}
        for sample in samples:
            for side, batch in sample["sides"].items():
                weight = batch.columns["row_weight"]
                totals[side][0] += float(weight.sum())
                totals[side][1] += float((batch.label_mask.sum(1) * weight).sum())
        totals |= {f"of {t.name}": [self._counted(t, samples)] * 2 for t in self.terms if t.counts is not None}
        flat = ranks.total(torch.tensor(list(totals.values())).flatten()).view(-1, 2).tolist()
        window = dict(zip(totals, flat, strict=True))
        for number, sample in enumerate(samples):
            sample |= {"totals": window, "first": number == 0}
        return samples, None

    def _counted(self, term: Term, samples: Sequence[dict]) -> float:
        """How much this rank's values of a term count in the window, which their labels alone say."""
        total = 0.0
        for sides in (sample["sides"] for sample in samples if _present(term, sample["sides"], first=False)):
            step = Step(self.model, self.anatomy, sides, constants=self.constants)
            made = step.run(free(term))
            made = gather(term, made, sides) if term.gathered and self.args.world_size > 1 else made
            total += float(weights_of(term, made, sides[str(term.over)]).sum())
        return total

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "sides": {side: batch.to(self.args.device) for side, batch in inputs["sides"].items()}}

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: a step has several passes."""
        return 0

    # --- one micro-batch ------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms whose sides are present."""
        sides = inputs["sides"]
        active = [t for t in self.terms if _present(t, sides, first=inputs["first"])]
        if not active:  # fewer rows than micro-batches: the others of the window have them
            return torch.zeros((), device=self.args.device, requires_grad=True)
        needs = list(dict.fromkeys(p for t in active for p in t.needs()))
        # By the step: however a step is cut into micro-batches, a row gets the same dropout.
        seed = (self.settings.seed << 24) + inputs["micro"] // self.settings.schedule.accumulate
        step = Step(model, self.anatomy, sides, reference=self.reference, constants=self.constants, seed=seed)
        # The Trainer puts the model's own forward alone under autocast; views and the head run outside of it.
        with autocast(self.precision, self.args.device.type):
            made = step.run(needs)
        loss = torch.zeros((), device=self.args.device)
        for term in active:
            loss = loss + self.weight(term) * self._share(term, made, sides, inputs["totals"])
        # Wrappers average gradients over ranks, while the totals already span them.
        return loss * self.args.world_size

    def _share(
        self, term: Term, made: dict[Product, Any], sides: dict[str, Batch], totals: Mapping[str, list[float]]
    ) -> Tensor:
        """What this micro-batch adds to the term's value in this step: its part of the mean over the window."""
        made = gather(term, made, sides) if term.gathered and self.args.world_size > 1 else made
        values = value_of(term, made)
        if term.over is None:  # a value of the weights, the same on every rank
            share = values / self.args.world_size
        else:
            total = totals[term.over if term.counts is None else f"of {term.name}"][1 if term.per == "token" else 0]
            share = (values * weights_of(term, made, sides[term.over])).sum() / (total or 1.0)
        number = float(share.detach())
        if not torch.isfinite(share.detach()):
            raise TrainingStopped(
                f"step {self.state.global_step + 1}: the term '{term.name}' is not finite; the weights were left as "
                "they were before this step: lower the learning rate or the term's weight"
            )
        self._window[term.name] = self._window.get(term.name, 0.0) + number
        if term.monitor is not None:
            with torch.no_grad():
                for key, value in term.monitor(**arguments(term.inputs, lambda p: made[p])).items():
                    self._monitor[f"{term.name}/{key}"] = float(value)
        return share

    def weight(self, term: Term, *, ago: int = 0) -> float:
        """The term's weight in the step to come, or the one ``ago`` steps before it (before duals are updated)."""
        if isinstance(term.weight, Dual):
            return self.duals[term.name]
        if isinstance(term.weight, Ramp):
            return term.weight.at((self.state.global_step - ago) / self.plan.steps)
        return float(term.weight)

    # --- between steps --------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Of a weight whose updates have a shape, what is clipped is the gradient of what is moved."""
        optimise.shape(self.optimizer)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Runs between the backward pass and the optimizer's step: the last moment to refuse a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingStopped(
                f"step {self.state.global_step + 1}: the gradient is not finite (terms: {', '.join(self._window)}); "
                "the weights were left as they were before this step"
            )
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step: dual weights, the log, then whatever the Trainer does (saving)."""
        stepped = bool(self._window)  # the Trainer calls once more at the end
        if stepped:
            self._after_step(grad_norm, kwargs.get("learning_rate"))
            if self.retake is not None:  # before a checkpoint is written, which has to hold them
                self._retaken(self.retake(self.state.global_step))
            # The same here: what a checkpoint's step looked like has to be known to whoever resumes from it.
            if self.should_stop is not None and self.should_stop(self.state.global_step):
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _retaken(self, constants: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.retaken |= constants
        self.constants |= {name: _on(value, self.args.device) for name, value in constants.items()}

    def _after_step(self, grad_norm: Any, lr: float | None) -> None:
        names = sorted(self._window)
        sums = ranks.total(torch.tensor([self._window[n] for n in names])).tolist()
        means = dict(zip(names, sums, strict=True))
        weights = {t.name: self.weight(t, ago=1) for t in self.terms if t.name in means}
        progress = self.state.global_step / self.plan.steps
        for term in self.terms:
            if isinstance(term.weight, Dual) and term.name in means:
                old = self.duals[term.name]
                self.duals[term.name] = term.weight.updated(old, value=means[term.name], progress=progress)
        if self.state.global_step % self.settings.log_every == 0 or self.state.global_step == self.plan.steps:
            record: dict[str, Any] = {"loss": sum(weights[n] * means[n] for n in names), "progress": progress}
            record |= {f"terms/{n}": v for n, v in means.items()} | {f"weights/{n}": v for n, v in weights.items()}
            record |= {f"monitor/{k}": v for k, v in self._monitor.items()}
            record["lr"] = self._get_learning_rate() if lr is None else lr
            if grad_norm is not None:
                record["grad_norm"] = float(grad_norm)
            self.log(record)
        self._window, self._monitor = {}, {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """From the recipe (`optimise.optimizer`)."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer: Any = optimise.optimizer(self.model, self.settings.optimiser, self.shapes)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """From the recipe (`optimise.rate`)."""
        if getattr(self, "lr_scheduler", None) is None:
            settings = self.settings.optimiser
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: optimise.rate(step, num_training_steps, settings)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / ".staging")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it with the hash of every file, then rename it into place."""
        staged = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # what a killed run left there is not taken along
            shutil.rmtree(staged, ignore_errors=True)
        ranks.wait()
        super()._save_checkpoint(model, trial)
        ranks.wait()
        if self.args.should_save:
            (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing of ours reads
            (staged / "duals.json").write_text(json.dumps(self.duals))
            if self.retaken:
                flat = {f"{c}::{n}": t.cpu().contiguous() for c, part in self.retaken.items() for n, t in part.items()}
                save_file(flat, staged / RETAKEN)
            if self.beside is not None:
                self.beside(staged)
            final = Path(self.args.output_dir) / staged.name
            files.seal(staged, final)
            for old in checkpoints(Path(self.args.output_dir))[:-2]:
                shutil.rmtree(old)
        ranks.wait()

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint whose files are what their hashes say; the result is the uninterrupted one."""
        files.verify(checkpoint)
        self.duals = {**self.duals, **json.loads((checkpoint / "duals.json").read_text())}
        if (checkpoint / RETAKEN).is_file():
            kept: dict[str, dict[str, Tensor]] = {}
            for key, value in load_file(checkpoint / RETAKEN).items():
                constant, _, name = key.rpartition("::")
                kept.setdefault(constant, {})[name] = value
            self._retaken(kept)
        self.train(resume_from_checkpoint=str(checkpoint))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; a torn one is not whole."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            files.verify(path)
        except IntegrityFailed:
            continue
        found.append(path)
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def _on(value: Any, device: torch.device) -> Any:
    """A constant on a device, once and not in every step: a tensor, or one for each layer."""
    return {name: v.to(device) for name, v in value.items()} if isinstance(value, Mapping) else value.to(device)


def autocast(precision: str, device: str = "cpu") -> Any:
    """The precision of a pass: mixed precision for ``bf16-mixed``, nothing otherwise."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
