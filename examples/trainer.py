"""HLoRA with transformers.Trainer: one callback records, `hlora.protect` protects.

python examples/trainer.py                     # SmolLM2-135M, fetched once
python examples/trainer.py --model DIR --steps 100
"""

import argparse
import pydoc_data.topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hlora
from hlora.model.embedded import model_directory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or hub name (default: SmolLM2-135M)")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each phase")
parser.add_argument("--phi", type=float, default=9.0, help="weight of the penalty; 0 is LoRA without protection")
parser.add_argument("--output", default="runs/trainer")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model or model_directory())
base = AutoModelForCausalLM.from_pretrained(args.model or model_directory())
torch.manual_seed(0)
lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, lora)


def rows(text: str, length: int) -> list[dict[str, list[int]]]:
    """The text as rows of `length` tokens."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    cuts = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": cut, "labels": cut} for cut in cuts]


# General text: what the model should not forget. Domain: what it should learn; here, squares of numbers.
general = rows("\n\n".join(pydoc_data.topics.topics.values()), length=128)
domain = rows(" ".join(f"The square of {n} is {n * n}." for n in range(10, 400)), length=64)

arguments = TrainingArguments(
    output_dir=f"{args.output}/logs",
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=8e-4,  # in both phases, which goes with phi 9; docs/quickstart.md advises a quarter of it to record
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
recorder = hlora.ImportanceRecorder(model)
Trainer(model, arguments, default_data_collator, general, callbacks=[recorder.callback()]).train()
recorder.consolidate(data={"text": "pydoc_data.topics"}).save(f"{args.output}/importance")

trainer = Trainer(model, arguments, default_data_collator, domain)
hlora.protect(trainer, f"{args.output}/importance", phi=args.phi)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")  # an ordinary PEFT adapter
