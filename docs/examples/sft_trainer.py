"""Train a small student on stored logits with TRL's SFTTrainer, on one process or several.

python docs/examples/sft_trainer.py demo/logits --steps 20
torchrun --nproc-per-node 2 docs/examples/sft_trainer.py demo/logits --steps 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from explore_logits import (
    LogitIterableDataset,
    collate_logits,
    distillation_loss,
    load_extraction_config,
)


class DistillationSFTTrainer(SFTTrainer):
    """An SFTTrainer whose loss is the divergence from the stored teacher."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum over the batch's tokens, divided by those of the whole step."""
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**text)
        loss = distillation_loss(outputs.logits, inputs, reduction="sum")
        count = num_items_in_batch
        if count is None:
            count = (inputs["labels"][:, 1:] != -100).sum()
        elif self.args.average_tokens_across_devices:  # the gradients are a mean over processes
            loss = loss * self.accelerator.num_processes
        loss = loss / torch.as_tensor(count).clamp(min=1)  # all conversations may be cut to nothing
        return (loss, outputs) if return_outputs else loss

    def _prepare_input(self, data: Any) -> Any:
        """Keep the teacher in float32: under DeepSpeed, Trainer casts whatever is floating."""
        if torch.is_tensor(data) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="a folder of extract_logits.py, or a dataset on the Hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--save", type=Path, help="folder for the student and its checkpoints")
    parser.add_argument("--save-steps", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    arguments = SFTConfig(
        output_dir=str(args.save or "demo/student"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenized
        max_length=None,  # LogitIterableDataset cuts them, with their teacher
        remove_unused_columns=False,  # the teacher's are no arguments of the model
        accelerator_config={"dispatch_batches": False},  # batches differ in length
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="steps" if args.save else "no",
        save_steps=args.save_steps,
        use_cpu=not torch.cuda.is_available(),
    )
    settings = load_extraction_config(args.output)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=56,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    trainer = DistillationSFTTrainer(
        LlamaForCausalLM(shape),
        arguments,
        train_dataset=LogitIterableDataset(args.output, max_seq_len=512).as_datasets(),
        data_collator=collate_logits,
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    if args.save:
        trainer.save_model()


if __name__ == "__main__":
    main()
