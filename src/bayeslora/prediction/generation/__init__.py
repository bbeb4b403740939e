"""Text from a posterior: averaged over the draws token by token, or one answer a draw."""

from bayeslora.prediction.generation.answers import Answer, Answers
from bayeslora.prediction.generation.decoding import Step
from bayeslora.prediction.generation.run import generate, generate_each
from bayeslora.prediction.generation.semantic import by_embedding, by_entailment, exactly

__all__ = ["Answer", "Answers", "Step", "by_embedding", "by_entailment", "exactly", "generate", "generate_each"]
