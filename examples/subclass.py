"""A Trainer in ten lines, configured in code. Run it with `python -m examples.subclass`."""

import torch.nn.functional as F
from torch import nn

import safeloop as sl
from safeloop.datasets import Digits


class Classifier(sl.Trainer):
    def loss(self, batch):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def metrics(self, batch):
        images, labels = batch
        return {"accuracy": self.model(images).argmax(1) == labels}


if __name__ == "__main__":
    trainer = Classifier(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        data={"train": Digits(split="train"), "eval": Digits(split="test"), "batch_size": 64},
        optimizers={"type": "AdamW", "lr": 3e-3},
        run={"max_steps": 500},
    )
    print(f"accuracy {trainer.fit().metrics['accuracy']:.3f}")
