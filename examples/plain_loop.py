"""HLoRA in a plain PyTorch loop: record on general text, save, load, tune on a domain with the penalty in view.

python examples/plain_loop.py [--model DIR] [--steps 100]   # default: SmolLM2-135M, fetched once
"""

import argparse
import pydoc_data.topics
import random

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hlora
from hlora.model.embedded import model_directory

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="directory or hub name (default: SmolLM2-135M)")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each phase")
parser.add_argument("--phi", type=float, default=9.0, help="weight of the penalty; 0 is LoRA without protection")
parser.add_argument("--output", default="runs/plain_loop")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model or model_directory())
base = AutoModelForCausalLM.from_pretrained(args.model or model_directory()).to(device)
torch.manual_seed(0)
lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, lora)

# General text: what the model should not forget. Domain: what it should learn; here, squares of numbers.
general = tokenizer("\n\n".join(pydoc_data.topics.topics.values()), return_tensors="pt", verbose=False)["input_ids"][0]
general = general[: len(general) // 512 * 512].view(-1, 4, 128).to(device)  # batches of 4 rows of 128 tokens
draw = random.Random(0)
numbers = [[draw.randrange(10, 100) for _ in range(8)] for _ in range(args.steps)]
domain = [" ".join(f"The square of {n} is {n * n}." for n in row) for row in numbers]

# The same rate in both phases, which goes with phi 9; docs/quickstart.md advises a quarter of it to record.
optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
recorder = hlora.ImportanceRecorder(model)
for step in range(args.steps):
    batch = general[step % len(general)]
    model(input_ids=batch, labels=batch).loss.backward()
    with recorder.step(lr=optimizer.param_groups[0]["lr"]):
        optimizer.step()  # clip in here too, if you clip
    optimizer.zero_grad()
recorder.consolidate(data={"text": "pydoc_data.topics"}).save(f"{args.output}/importance")
del recorder  # which reads every backward pass of the model until then
importance = hlora.Importance.load(f"{args.output}/importance")  # in another script: load_adapter_into(model) too
penalty = hlora.ImportancePenalty(model, importance, phi=args.phi)
optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
for text in domain:
    batch = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    task_loss, protection = model(input_ids=batch, labels=batch).loss, penalty()
    (task_loss + protection).backward()  # Eq. 16, in view
    optimizer.step()
    optimizer.zero_grad()
    print(f"task loss {task_loss:.3f}, penalty {protection:.4f}")
model.save_pretrained(f"{args.output}/adapter")  # an ordinary PEFT adapter
