"""Train a small student on stored logits with transformers' Trainer, on one process or several.

python docs/examples/trainer.py demo/logits --steps 20
torchrun --nproc-per-node 2 docs/examples/trainer.py demo/logits --steps 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from explore_logits import (
    LogitIterableDataset,
    collate_logits,
    distillation_loss,
    load_extraction_config,
)


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the divergence from the stored teacher."""

    alpha = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        # As a loss function of the Trainer's own, it leaves to it what accumulation and several
        # devices need: the loss is a sum over tokens, divided by those of the whole step.
        super().__init__(*args, compute_loss_func=self.distill, **options)
        if self.args.n_gpu > 1:  # of one process: Trainer multiplies the loss by their number
            raise SystemExit("several GPUs: run this under torchrun, or set CUDA_VISIBLE_DEVICES=0")

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Keep the batch, which a loss function is not given, and feed the model its text."""
        self.batch = inputs
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().compute_loss(model, text, *args, **options)

    def distill(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the divergence, mixed with 1 - alpha of the cross-entropy on the text."""
        loss = distillation_loss(outputs.logits, self.batch, alpha=self.alpha, reduction="sum")
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / torch.as_tensor(count).clamp(min=1)  # all conversations may be cut to nothing

    def _prepare_input(self, data: Any) -> Any:
        """Keep the teacher in float32: under DeepSpeed, Trainer casts whatever is floating."""
        if torch.is_tensor(data) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def get_train_dataloader(self) -> Any:
        """Make a loader that accelerate does not divide: the dataset divides itself."""
        dataset: Any = self.train_dataset
        dataset.batch_size = self._train_batch_size  # whole batches to each worker
        loader: Any = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="a folder of extract_logits.py, or a dataset on the Hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--save", type=Path, help="folder for the student and its checkpoints")
    parser.add_argument("--save-steps", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--alpha", type=float, default=1.0, help="share of the teacher in the loss")
    args = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=str(args.save or "demo/student"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,  # the teacher's are no arguments of the model
        logging_steps=1,
        report_to="none",
        save_strategy="steps" if args.save else "no",
        save_steps=args.save_steps,
        use_cpu=not torch.cuda.is_available(),
    )
    dataset: Any = LogitIterableDataset(
        args.output,
        seed=0,
        max_seq_len=512,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=load_extraction_config(args.output)["vocab_size"],
        hidden_size=56,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    trainer = DistillationTrainer(
        LlamaForCausalLM(shape), arguments, train_dataset=dataset, data_collator=collate_logits
    )
    trainer.alpha = args.alpha
    trainer.train(resume_from_checkpoint=args.resume)
    if args.save:
        trainer.save_model()


if __name__ == "__main__":
    main()
