"""Hugging Face's Trainer: a transformer from scratch under rates copied from a fine-tuning recipe.

``pip install 'densitylr[huggingface]'``, then ``python examples/huggingface_trainer.py``. It runs
without a network: the model is made from a configuration, the text from random tokens.
"""

import tempfile

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from densitylr.integrations.huggingface import DensityCallback

WORDS, LENGTH, BASE = 64, 16, 2e-3


def reviews(examples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sixteen words; is the review good, having more good words (2 to 9) than bad (10 to 17)?"""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, WORDS, (examples, LENGTH), generator=generator)
    good = ((words >= 2) & (words < 10)).sum(1)
    bad = ((words >= 10) & (words < 18)).sum(1)
    words, labels = words[good != bad], (good > bad)[good != bad].long()
    return [{"input_ids": w, "labels": label} for w, label in zip(words, labels, strict=True)]


def decayed(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    """AdamW with the head at the base rate and each part below it at ``decay`` of the next."""
    bert = model.bert
    parts = [bert.embeddings, *bert.encoder.layer, nn.ModuleList([bert.pooler, model.classifier])]
    groups = [
        {"params": part.parameters(), "lr": BASE * decay ** (len(parts) - 1 - i)}
        for i, part in enumerate(parts)
    ]
    return torch.optim.AdamW(groups, lr=BASE)


def train(decay: float, callbacks: list[DensityCallback]) -> float:
    """Accuracy on other reviews after 150 steps."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=150,
                per_device_train_batch_size=32,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=100,
                use_cpu=True,
            ),
            train_dataset=reviews(4000, seed=1),
            optimizers=(decayed(model, decay), None),
            callbacks=callbacks,  # the one line
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = trainer.predict(reviews(1000, seed=2))
    return float((found.predictions.argmax(1) == found.label_ids).mean())


def main() -> None:
    transformers.logging.set_verbosity_error()
    flat = train(1.0, [])
    starved = train(0.02, [])
    callback = DensityCallback()
    repaired = train(0.02, [callback])
    print(f"accuracy: one rate {flat:.3f}, layer-wise decay {starved:.3f}, with us {repaired:.3f}")
    assert callback.controller is not None
    print(*callback.controller.diagnose(), sep="\n")


if __name__ == "__main__":
    main()
