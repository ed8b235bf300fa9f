"""What to do about a model's stages, worst first, with the lines to paste."""

from __future__ import annotations

from dataclasses import dataclass

from densitylr.doctor.report.verdicts import ILL, StageVerdict
from densitylr.doctor.watch import Observer, Trainer

__all__ = ["Advice", "Remedy", "advise"]


@dataclass(frozen=True)
class Remedy:
    """One remedy: what to do, and the code that does it."""

    text: str
    code: str


@dataclass(frozen=True)
class Advice:
    """Advice on all stages of a model with the same fault; the first remedy is the best."""

    word: str
    stages: tuple[str, ...]
    remedies: tuple[Remedy, ...]


def advise(observer: Observer, found: list[StageVerdict]) -> list[Advice]:
    """One `Advice` for each fault, worst first, then for slow or frozen stages."""
    advice = []
    for word in (*ILL, "slow", "frozen"):
        ill = [s for s in found if s.word == word]
        if ill:
            names = tuple(s.stage for s in ill)
            advice.append(Advice(word, names, tuple(_remedies(observer, word, ill, found))))
    return advice


def _remedies(
    observer: Observer, word: str, ill: list[StageVerdict], found: list[StageVerdict]
) -> list[Remedy]:
    names = [s.stage for s in ill]
    if word in ("starved", "slow"):
        return _starved(observer, ill, found)
    if word == "hot":
        return [
            *_wrapped(observer, "let the network find the height of its rates", 'mode="warmup"'),
            *_lower(observer, ill),
        ]
    if word in ("collapsed", "non-finite"):
        return [
            *_wrapped(observer, "go back to the last healthy state by itself", "recover=True"),
            Remedy("or clip the gradients, right before the optimizer's step", _clip(observer)),
            *_lower(observer, ill),
        ]
    if word == "bad batch":
        note = "print(step, x.abs().max().item())  # x: what the model is called with"
        return [
            Remedy("find it: note the largest input, right before the model is called", note),
            Remedy("or clip the gradients, right before the optimizer's step", _clip(observer)),
        ]
    if word == "dead":
        text = (
            "no learning rate moves it, as units after it never fire: initialise the last dead "
            "stage anew, before training"
        )
        return [Remedy(text, _each(observer, names[-1:], "{}.reset_parameters()"))]
    if word == "bad gain":
        text = "no learning rate mends a bad scale: initialise it anew, before training"
        return [Remedy(text, _each(observer, names, "{}.reset_parameters()"))]
    if word == "left out":
        name, where = _optimizer(observer.trainers[0]) if observer.trainers else ("optimizer", "")
        add = name + '.add_param_group({"params": {}.parameters()})'
        return [
            Remedy(f"hand its parameters to the optimizer, {where}", _each(observer, names, add))
        ]
    text = (
        "if that is not meant: let it be trained, with a rate above 0 and a place in the optimizer"
    )
    return [Remedy(text, _each(observer, names, "{}.requires_grad_(True)"))]


def _starved(
    observer: Observer, ill: list[StageVerdict], found: list[StageVerdict]
) -> list[Remedy]:
    largest = max(found, key=lambda s: s.rate)
    low = [] if largest in ill else [s for s in ill if s.rate < largest.rate]
    one = len(observer.trainers) == 1
    if low and one:
        remedies = _wrapped(observer, "let the density run the rates", "")
        if largest.word != "hot":
            aim = "or give it the largest of your rates"
            remedies += _rates(observer, low, aim, largest.rate)
        return remedies
    return [
        *_wrapped(observer, "its rate is too low: let the network find it", 'mode="free"'),
        *_rates(
            observer,
            ill,
            f"{'or ' * one}try a hundred times the rate",
            max(s.rate for s in ill) * 100,
        ),
    ]


def _lower(observer: Observer, ill: list[StageVerdict]) -> list[Remedy]:
    return _rates(observer, ill, "or try a tenth of the rate", min(s.rate for s in ill) / 10)


def _wrapped(observer: Observer, aim: str, option: str) -> list[Remedy]:
    """`DensityLR` around the optimizer, where the script makes it; it takes no more than one."""
    if len(observer.trainers) != 1:
        return []
    arguments = ", ".join(filter(None, ("{}", _model(observer), option)))
    head = "from densitylr import DensityLR\n"
    made = observer.trainers[0].made
    if made is not None and made.assigned:
        code = f"{head}{made.assigned} = DensityLR({arguments.format(made.assigned)})"
        return [Remedy(f"{aim}, after {made}", code)]
    if made is not None and made.text:
        if made.within.partition(".")[0] == observer.kind:  # as in a LightningModule
            arguments = ", ".join(filter(None, ("{}", "self", option)))
        text = arguments.replace("{}", made.text, 1)
        return [Remedy(f"{aim}, in place of the optimizer at {made}", f"{head}DensityLR({text})")]
    by = f"; {made} has a library make it" if made is not None else ""
    return [
        Remedy(
            f"{aim}: make the optimizer yourself, and hand this over in its place{by}",
            f"{head}optimizer = DensityLR({arguments.format('optimizer')})",
        )
    ]


def _rates(observer: Observer, ill: list[StageVerdict], aim: str, rate: float) -> list[Remedy]:
    """Another rate for the parameter groups of these stages, one remedy an optimizer."""
    found = []
    for trainer in observer.trainers:
        groups = sorted({i for s in ill for i in trainer.groups.get(s.stage, ())})
        if not groups:
            continue
        name, where = _optimizer(trainer)
        was = ", ".join(sorted({f"{s.rate:.1e}" for s in ill}))
        if len(groups) == 1:
            code = f'{name}.param_groups[{groups[0]}]["lr"] = {rate:.3g}  # {was} so far'
        else:
            code = (
                f"for i in ({', '.join(map(str, groups))}):\n"
                f'    {name}.param_groups[i]["lr"] = {rate:.3g}  # {was} so far'
            )
        if trainer.made is not None and trainer.made.text and not trainer.made.assigned:
            numbers = ", ".join(map(str, groups))
            where = f"in the groups that {trainer.made} hands over"
            some = "group" if len(groups) == 1 else "groups"
            code = f'{{"params": …, "lr": {rate:.3g}}}  # {some} {numbers}; {was} so far'
        found.append(Remedy(f"{aim}, {where}", code))
    return found


def _clip(observer: Observer) -> str:
    return f"torch.nn.utils.clip_grad_norm_({_model(observer)}.parameters(), 1.0)"


def _each(observer: Observer, stages: list[str], act: str) -> str:
    """The act for each weight layer of the stages, in place of ``{}``; a loop for several."""
    layers = [layer for stage in stages for layer in observer.layers.get(stage, ())]
    if len(layers) == 1:
        return act.replace("{}", f'{_model(observer)}.get_submodule("{layers[0]}")')
    listed = "\n".join(f'    "{layer}",' for layer in layers)
    body = act.replace("{}", f"{_model(observer)}.get_submodule(name)")
    return f"for name in (\n{listed}\n):\n    {body}"


def _model(observer: Observer) -> str:
    """What the script calls the model, where it is an expression; else ``model``."""
    direct = observer.called is not None and observer.called.function == observer.name
    return observer.name if direct else "model"


def _optimizer(trainer: Trainer) -> tuple[str, str]:
    """Its name in the script, and the line after which code is to be inserted."""
    made = trainer.made
    if made is None:
        return "optimizer", "after it is made"
    return made.assigned or "optimizer", f"after {made}"
