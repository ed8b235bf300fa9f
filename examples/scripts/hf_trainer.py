"""A small BERT from its configuration, under the Trainer. Ill: an encoder at a tiny rate."""

import os
import sys
import tempfile

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Words(torch.utils.data.Dataset):
    """Sequences of words; the label says whether the first word is among the later half."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.words = torch.randint(0, 64, (512, 12), generator=generator)

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"input_ids": self.words[index], "labels": int(self.words[index, 0] >= 32)}


def main():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    optimizers = (None, None)
    if "--ill" in sys.argv:
        encoder = list(model.bert.encoder.parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in encoder)]
        groups = [{"params": encoder, "lr": 1e-9}, {"params": rest, "lr": 3e-3}]
        optimizers = (torch.optim.AdamW(groups), None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=80,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Words(), optimizers=optimizers)
        print(repr(trainer.train().training_loss))


if __name__ == "__main__":
    main()
