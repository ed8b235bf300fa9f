"""Two replicas whose wrapper is made by another library's callback."""

from __future__ import annotations

import json
import warnings
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from tests.matrix.ranks.common import (
    STAGES,
    STARVED,
    Run,
    main,
    net,
    on_all,
    same,
    sgd,
    train,
    user_groups,
)


def resumed_by_hugging_face() -> None:
    """Half of the steps, a checkpoint, another model that goes on: as one run all the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of importing it
        from transformers import TrainerState

        from densitylr.integrations.huggingface import DensityCallback

    def run(steps: range, checkpoint: Any = None) -> tuple[Run, DensityCallback]:
        state = TrainerState(stateful_callbacks={})
        callback, model = DensityCallback(every=2), net()
        callback.on_init_end(None, state, None, model=model)
        optimizer = sgd(user_groups(model, STARVED))
        if checkpoint is not None:  # in a trainer's order
            state.global_step = steps.start
            state.stateful_callbacks = {"DensityCallback": checkpoint["ours"]}
            model.load_state_dict(checkpoint["weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
        assert callback.controller is not None
        return train(DistributedDataParallel(model), callback.controller, steps), callback

    whole, _ = run(range(24))
    half, callback = run(range(4))
    assert callback.controller is not None
    checkpoint = {
        "weights": half.weights,
        "optimizer": callback.controller.inner.state_dict(),
        "ours": json.loads(json.dumps(callback.state())),
    }
    callback.controller.close()
    rest, _ = run(range(4, 24), checkpoint)
    assert half.scales + rest.scales == whole.scales
    assert rest.scales[-1] != dict.fromkeys(STAGES, 1.0)
    assert same(rest.weights, whole.weights)
    weights, scales = on_all(rest.weights), on_all(rest.scales)
    assert same(weights[0], weights[1])
    assert scales[0] == scales[1]


if __name__ == "__main__":
    main({"resumed": resumed_by_hugging_face})
