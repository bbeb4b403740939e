"""Ask the draws that a server holds: probabilities of choices, and one answer a draw.

bayeslora export run --draws 10 --out adapters     # prints the line that starts vLLM with them
bayeslora verify run --server http://localhost:8000
python examples/serving/vllm_client.py http://localhost:8000
"""

import argparse
import sys

import bayeslora as bl
from bayeslora.integrations.openai.client import Adapters
from bayeslora.tasks.synthetic import chance_task

parser = argparse.ArgumentParser(description="Ask the draws that a server holds.")
parser.add_argument("url", nargs="?", default="http://localhost:8000", help="address of the server")
parser.add_argument("--api-key", help="the server's key, if it wants one")
parser.add_argument("--rows", type=int, default=20, help="questions about bags and dice to ask")
options = parser.parse_args()

server = Adapters(options.url, api_key=options.api_key, retries=1)
questions = chance_task(train_rows=1, validation_rows=1, test_rows=options.rows).test
assert questions is not None
try:
    print("adapters:", *server.served())
except bl.InputError as error:
    sys.exit(f"{error}\nTo serve draws: bayeslora export RUN --draws 10 --out adapters, then the line that it prints.")

prediction = server.predict(questions)
answers = server.generate_each([questions.examples[0].text], max_tokens=8)[0]
print(bl.evaluate(prediction, questions, resamples=0).table())
print(f"{questions.examples[0].text} …")
for k, answer in zip(answers.draws, answers.answers, strict=True):
    print(f"  draw {k}: {answer.text!r} (log-likelihood {answer.log_likelihood:.2f})")
print(f"semantic entropy {answers.semantic_entropy:.2f} nats, best answer {answers.best().text!r}")
