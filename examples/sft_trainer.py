"""HLoRA with TRL's SFTTrainer: record importance once, then add two lines to each script that tunes.

python examples/sft_trainer.py                 # SmolLM2-135M, fetched once
python examples/sft_trainer.py --model DIR --steps 100
"""

import argparse
import pydoc_data.topics

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import hlora
from hlora.model.embedded import model_directory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or hub name (default: SmolLM2-135M)")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each phase")
parser.add_argument("--phi", type=float, default=9.0, help="weight of the penalty; 0 is LoRA without protection")
parser.add_argument("--output", default="runs/sft_trainer")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model or model_directory())
lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
options = SFTConfig(
    output_dir=f"{args.output}/logs",
    max_steps=args.steps,
    per_device_train_batch_size=4,
    max_length=128,
    learning_rate=8e-4,  # in both phases, which goes with phi 9; docs/quickstart.md advises a quarter of it to record
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    bf16=False,
)


def fresh_model():
    set_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(args.model or model_directory()), lora)


# Once for each base model and LoRA configuration: record on general text, which the model should not forget.
general = Dataset.from_dict({"text": list(pydoc_data.topics.topics.values())})
model = fresh_model()
recorder = hlora.ImportanceRecorder(model)
SFTTrainer(model, options, train_dataset=general, processing_class=tokenizer, callbacks=[recorder.callback()]).train()
recorder.consolidate(data={"text": "pydoc_data.topics"}).save(f"{args.output}/importance")

# For each domain: your own script, with `protect` before `train`. Here the model learns squares of numbers.
domain = [{"prompt": f"Question: What is {n} squared?\nAnswer:", "completion": f" {n * n}"} for n in range(10, 400)]
model = fresh_model()
trainer = SFTTrainer(model, options, train_dataset=Dataset.from_list(domain), processing_class=tokenizer)
hlora.protect(trainer, f"{args.output}/importance", phi=args.phi)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")  # an ordinary PEFT adapter
