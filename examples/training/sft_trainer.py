"""SWAG in TRL's own SFTTrainer: no class to subclass, one line more.

    python examples/training/sft_trainer.py

About a minute on two CPU cores; needs pip install trl.
"""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.tasks.synthetic import chance_task

task = chance_task(train_rows=40)
rows = Dataset.from_list(
    [{"prompt": e.text, "completion": f" {e.choices[e.label]}"} for e in task.train if e.label is not None]
)
model, tokenizer = bl.load_model(demo_model(), target_modules=["q_proj", "v_proj"])
args = SFTConfig(
    "sft/run", max_steps=12, learning_rate=5e-4, save_strategy="no", report_to="none", bf16=torch.cuda.is_available()
)

method = bl.Swag(start=4, interval=2)
trainer = SFTTrainer(
    model, args, train_dataset=rows, processing_class=tokenizer, **method.trainer_kwargs(model, num_data=len(rows))
)
trainer.train()
posterior = method.posterior(trainer.model)

prediction = bl.predict(model, posterior, task.test, draws=3, tokenizer=tokenizer)
print(bl.evaluate(prediction, task.test, resamples=0).table())
