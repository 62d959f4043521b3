"""Run the trainers that read our rows and exports, with the teacher as its own student.

    python tests/tools/clients.py

Prints a table: client, what is run, the loss of the teacher as its own student, and the right one.
That is 0 where the client sees what the teacher is; minus the logarithm of what the k entries held
where they are scaled to the sum 1; near 0 at another temperature than 1, where what the tail holds
is estimated from its sample, and where packed conversations see each other. `make clients` installs
axolotl; DistillKit is run where its clone was installed by hand (docs/distillation.md); where a
client is missing, its row says so. Ends with exit code 1 where a loss is wrong.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import TEACHER, print_head, print_row

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from conftest import extract_chats, load_example
from datasets import load_from_disk
from processes import run_process
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import explore_logits as ex

NEAR = 2e-3  # nats; logits are stored in 16 bits
NEAR_ESTIMATED = 0.1  # at temperature 2; where packed conversations see each other
QUIET: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "logging_steps": 1,
    "remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True, "bf16": False,
}  # fmt: skip

Found = tuple[str, float, float | None]  # what is run, its loss, the right one; None: an estimate


def load_teacher() -> Any:
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@torch.no_grad()
def run_layers(student: Any, batch: Any) -> Any:
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return student.model(**text).last_hidden_state


def run_plain(output: Path, _: Path) -> Iterator[Found]:
    student, dataset = load_teacher(), ex.LogitIterableDataset(output)
    batch = next(iter(DataLoader(dataset, batch_size=8, collate_fn=ex.collate_logits)))
    hidden = run_layers(student, batch)
    logits, head = student.lm_head(hidden).detach(), student.lm_head.weight
    yield "distillation_loss", float(ex.distillation_loss(logits, batch)), 0.0
    warm = ex.distillation_loss(logits, batch, temperature=2.0)
    yield "distillation_loss(temperature=2)", float(warm), None
    loss = ex.distillation_loss_from_hidden(hidden, head, batch)
    yield "distillation_loss_from_hidden", float(loss), 0.0


def run_transformers(output: Path, folder: Path) -> Iterator[Found]:
    trainer_class = load_example("trainer").DistillationTrainer
    arguments = TrainingArguments(output_dir=str(folder / "trainer"), **QUIET)
    dataset = ex.LogitIterableDataset(output)
    for name, rows in (("LogitIterableDataset", dataset), ("as_datasets()", dataset.as_datasets())):
        loss = train_once(trainer_class, arguments, rows)
        yield f"docs/examples/trainer.py, {name}", loss, 0.0


def run_trl(output: Path, folder: Path) -> Iterator[Found]:
    from trl import SFTConfig

    unprepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    arguments = SFTConfig(output_dir=str(folder / "sft"), **unprepared, **QUIET)
    loss = train_once(
        load_example("sft_trainer").DistillationSFTTrainer, arguments,
        ex.LogitIterableDataset(output).as_datasets(),
        processing_class=AutoTokenizer.from_pretrained(TEACHER),
    )  # fmt: skip
    yield "docs/examples/sft_trainer.py, as_datasets()", loss, 0.0


def train_once(trainer_class: Any, arguments: Any, rows: Any, **options: Any) -> float:
    """Train for the one step and return the loss that the trainer logs."""
    options |= {"train_dataset": rows, "data_collator": ex.collate_logits}
    trainer = trainer_class(load_teacher(), arguments, **options)
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def run_axolotl(output: Path, folder: Path) -> Iterator[Found]:
    """Collate exports with axolotl's collator, and take its kernel's loss as its trainer does."""
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

    student, words = load_teacher(), AutoTokenizer.from_pretrained(TEACHER)
    for temperature, normalize in ((1.0, False), (1.0, True), (2.0, False), (2.0, True)):
        made = folder / f"axolotl-{temperature:g}-{normalize}"
        ex.export_axolotl(output, made, k=64, temperature=temperature, normalize=normalize)
        rows: Any = load_from_disk(str(made))
        batch = DataCollatorForKD(words)([rows[i] for i in range(8)])
        targets = [batch[f"target_{name}"] for name in ("token_ids", "logprobs", "mask")]
        hidden = run_layers(student, batch)
        kernel = LigerFusedLinearKLTopKLogprobLoss(
            0.0, 1.0, temperature, 0.0, compiled=False, compute_ce_loss=False, normalize_topk=False
        )
        loss = kernel(student.lm_head.weight, hidden, *targets, true_labels=batch["labels"])
        count = int((batch["labels"] != -100).sum())
        told = f"export_axolotl(temperature={temperature:g}, normalize={normalize})"
        right = 0.0 if temperature == 1 else None
        if normalize:
            right = lost_by_scaling(student, hidden, targets, temperature)
        yield told, float(loss.detach()) / count, right


def lost_by_scaling(student: Any, hidden: Any, targets: Any, temperature: float) -> float:
    """Return the mean divergence of the teacher's k entries, scaled to 1, from the teacher."""
    ids, _, mask = targets
    where = mask.bool().any(-1)
    with torch.no_grad():
        logits = student.lm_head(hidden[where]) / temperature
    log_probs = logits.log_softmax(-1).gather(1, ids[where].long())
    held = log_probs.masked_fill(~mask[where].bool(), -np.inf).logsumexp(-1)
    return float(-held.mean()) * temperature**2


def run_distillkit(output: Path, folder: Path) -> Iterator[Found]:
    """Run DistillKit's two commands on exports; its mask fits a divergence alone."""
    fitted, loose, packed = (folder / f"kit-{name}" for name in ("fitted", "loose", "packed"))
    ex.export_distillkit(output, fitted, k=64, labels_at="predicting", max_length=256)
    ex.export_distillkit(output, loose, k=64, labels_at="predicting")
    start("distillkit.pack_logits", "--dataset", loose, "--max-len", 256, "--output", packed)
    told = "export_distillkit(labels_at='predicting'"
    held: list[Any] = []  # by the k entries, of each distribution that DistillKit trains on
    for row in load_from_disk(str(fitted)):
        values = np.array(row["compressed_logprobs"], np.uint8)[np.array(row["labels"]) >= 0]
        held.extend(np.exp(values.view(np.float32)).sum(1))
    for rows, missing, right in (
        (fitted, "symmetric_uniform", 0.0),
        (fitted, "zero", float(-np.log(held).mean())),
        (packed, "symmetric_uniform", None),
    ):
        way = "), pack_logits" if rows == packed else ", max_length=256)"
        yield f"{told}{way}, kl: {missing}", train_distillkit(rows, missing, fitted), right


def train_distillkit(rows: Path, missing: str, exported: Path) -> float:
    """Return the loss that DistillKit's command logs for one step on all rows."""
    compressor = yaml.safe_load((exported / "compression_config.yaml").read_text())
    kl = {"function": "kl", "weight": 1.0, "temperature": 1.0}
    config = {
        "model": str(TEACHER), "model_kwargs": {"dtype": "float32"}, "use_flash_attention": False,
        "output_path": str(rows.parent / "kit-student"), "sequence_length": 256,
        "dataset": {"train_dataset": {"disk_path": str(rows)}, "prepacked": True},
        "teacher": {"kind": "dataset", "logprob_compressor": compressor},
        "loss_functions": [{**kl, "missing_probability_handling": missing}],
        "training_args": {**QUIET, "per_device_train_batch_size": 32},
    }  # fmt: skip
    file = rows.parent / "kit.yaml"
    file.write_text(yaml.safe_dump(config))
    said = start("distillkit.main", file)
    (loss,) = re.findall(r"distillation_loss/1_kl': '?([\d.e-]+|nan|inf)", said)
    return float(loss)


def start(module: str, *words: object) -> str:
    done = run_process([sys.executable, "-m", module, *words], timeout_s=1800)
    assert done.code == 0, done.stderr
    return done.stdout


CLIENTS: dict[str, Callable[[Path, Path], Iterator[Found]]] = {
    "PyTorch": run_plain, "transformers": run_transformers, "TRL": run_trl, "axolotl": run_axolotl,
    "DistillKit": run_distillkit,
}  # fmt: skip


def main() -> int:
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        output = extract_chats(Path(scratch), "--limit", 24, "--store-tokens")
        for client, run in CLIENTS.items():
            module = "torch" if client == "PyTorch" else client.lower()
            if importlib.util.find_spec(module) is None:
                rows.append((client, "not installed, not run", "", "", ""))
                continue
            name = f"{client} {importlib.metadata.version(module)}"
            for told, loss, right in run(output, Path(scratch)):
                good = abs(loss - (right or 0)) < (NEAR_ESTIMATED if right is None else NEAR)
                wrong += not good
                wanted = "near 0" if right is None else f"{right:.4f}"
                result = "as it should be" if good else "WRONG"
                rows.append((name, told, result, f"{loss:.4f}", wanted))
    print_head("client", "what is run", "result", "loss", "right")  # after what trainers print
    for row in rows:
        print_row(*row)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
