"""Fine-tune, keep the posterior, predict with uncertainty: the README's example on the demo's model and data.

    python examples/quickstart.py

About two minutes on two CPU cores.
"""

import sys

from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.tasks.synthetic import chance_task

rows = int(sys.argv[1]) if len(sys.argv) > 1 else 120
task = chance_task(train_rows=rows, test_rows=rows)
model, tokenizer = bl.load_model(demo_model(), target_modules=["q_proj", "v_proj"])
args = TrainingArguments("quickstart/run", num_train_epochs=3, learning_rate=1e-3, save_strategy="no", report_to="none")

posterior = bl.fit(model, task, bl.Swag(start=0.5, learning_rate=5e-4), args, tokenizer=tokenizer)
posterior.save_pretrained("quickstart/posterior", overwrite=True)

prediction = bl.predict(model, bl.load_posterior("quickstart/posterior"), task.test, draws=5, tokenizer=tokenizer)
print(prediction.probs[0], prediction.entropy[0], prediction.mutual_information[0])
print(bl.evaluate(prediction, task.test, resamples=200).table())
