"""What to do about a model's stages, worst first, with the lines to paste."""

from __future__ import annotations

from dataclasses import dataclass

from densitylr.doctor.states import ILL, StageState
from densitylr.doctor.watching import Trainer, Watch

__all__ = ["Advice", "Remedy", "advise"]


@dataclass(frozen=True)
class Remedy:
    """One way to mend it: what to do, and the code that does it."""

    text: str
    code: str


@dataclass(frozen=True)
class Advice:
    """About all stages of a model that are ill in the same way; the first remedy is the best."""

    word: str
    stages: tuple[str, ...]
    remedies: tuple[Remedy, ...]


def advise(watch: Watch, found: list[StageState]) -> list[Advice]:
    """One `Advice` an illness, worst first; at the end what is slow or frozen. Empty if all is well."""
    advice = []
    for word in (*ILL, "slow", "frozen"):
        ill = [s for s in found if s.word == word]
        if ill:
            names = tuple(s.stage for s in ill)
            advice.append(Advice(word, names, tuple(_remedies(watch, word, ill, found))))
    return advice


def _remedies(
    watch: Watch, word: str, ill: list[StageState], found: list[StageState]
) -> list[Remedy]:
    if word in ("starved", "slow"):
        return _starved(watch, ill, found)
    if word == "hot":
        lower = _rates(watch, ill, min(s.rate for s in ill) / 10)
        return [_wrapped(watch, "let the network find the height of its rates", 'mode="warmup"')] + [
            Remedy(f"or try a tenth of the rate, {where}", code) for where, code in lower
        ]
    if word in ("collapsed", "non-finite"):
        clip = f"torch.nn.utils.clip_grad_norm_({_model(watch)}.parameters(), 1.0)"
        lower = _rates(watch, ill, min(s.rate for s in ill) / 10)
        return [
            _wrapped(watch, "go back to the last healthy state by itself", "recover=True"),
            Remedy("or clip the gradients, right before optimizer.step()", clip),
            *(Remedy(f"or try a tenth of the rate, {where}", code) for where, code in lower),
        ]
    if word == "dead":
        return [
            Remedy(
                "no learning rate moves it: units after it never fire. Initialise the last dead "
                "stage anew, before training",
                _anew(watch, [ill[-1].stage]),
            )
        ]
    if word == "bad gain":
        return [
            Remedy(
                "no learning rate mends a bad scale: initialise these layers anew, before training",
                _anew(watch, [s.stage for s in ill]),
            )
        ]
    return _frozen(watch, [s.stage for s in ill])


def _starved(watch: Watch, ill: list[StageState], found: list[StageState]) -> list[Remedy]:
    ceiling = max(s.rate for s in found)
    low = [s for s in ill if s.rate < ceiling]
    if not low:
        return [_wrapped(watch, "all rates are too low: let the network find them", 'mode="free"')]
    return [
        _wrapped(watch, "let the density run the rates", ""),
        *(
            Remedy(f"or give it the largest of your rates, {where}", code)
            for where, code in _rates(watch, low, ceiling)
        ),
    ]


def _wrapped(watch: Watch, aim: str, option: str) -> Remedy:
    """`DensityLR` around the optimizer, where the script makes it."""
    arguments = ", ".join(filter(None, ("{}", _model(watch), option)))
    trainer = watch.trainers[0] if watch.trainers else None
    made = trainer.made if trainer is not None else None
    head = "from densitylr import DensityLR\n"
    if len(watch.trainers) > 1:
        aim += " (DensityLR takes one optimizer: put all groups into one)"
    if made is not None and made.assigned:
        code = f"{head}{made.assigned} = DensityLR({arguments.format(made.assigned)})"
        return Remedy(f"{aim}, after {made}", code)
    if made is not None and made.text:
        return Remedy(f"{aim}, at {made}", f"{head}DensityLR({arguments.format(made.text)})")
    where = f" (it is made by a library, called in {made})" if made is not None else ""
    return Remedy(
        f"{aim}: make the optimizer yourself{where}, and hand this over in its place",
        f"{head}optimizer = DensityLR({arguments.format('optimizer')})",
    )


def _rates(watch: Watch, ill: list[StageState], rate: float) -> list[tuple[str, str]]:
    """For each optimizer that holds these stages: where, and the groups' new rate."""
    found = []
    for trainer in watch.trainers:
        groups = sorted({i for s in ill for i in trainer.groups.get(s.stage, ())})
        if groups:
            name = trainer.made.assigned if trainer.made is not None else ""
            numbers = f"{groups[0]}," if len(groups) == 1 else ", ".join(map(str, groups))
            was = ", ".join(sorted({f"{s.rate:.1e}" for s in ill}))
            code = (
                f"for i in ({numbers}):  # now {was}\n"
                f'    {name or "optimizer"}.param_groups[i]["lr"] = {rate:.3g}'
            )
            found.append((_after(trainer), code))
    return found


def _anew(watch: Watch, stages: list[str]) -> str:
    layers = [layer for stage in stages for layer in watch.layers.get(stage, ())]
    names = ", ".join(repr(layer) for layer in layers)
    return (
        f"for name in ({names},):\n"
        f"    {_model(watch)}.get_submodule(name).reset_parameters()"
    )


def _frozen(watch: Watch, stages: list[str]) -> list[Remedy]:
    layers = [layer for stage in stages for layer in watch.layers.get(stage, ())]
    shown = "\n".join(f"    # {layer}" for layer in layers[:3])
    return [
        Remedy(
            "if that is not meant, let them be trained: requires_grad, a rate above 0, and a "
            "place in the optimizer",
            f"for name in ({', '.join(map(repr, layers))},):\n"
            f"    {_model(watch)}.get_submodule(name).requires_grad_(True)",
        )
    ] * bool(shown)


def _model(watch: Watch) -> str:
    """What the script calls the model, where it is an expression; else ``model``."""
    direct = watch.called is not None and watch.called.function == watch.name
    return watch.name if direct else "model"


def _after(trainer: Trainer) -> str:
    return "after it is made" if trainer.made is None else f"after {trainer.made}"
