"""Text from a posterior: averaged over the draws token by token, or one answer a draw."""

from bayeslora.generation.answers import Answer, Answers
from bayeslora.generation.decode import Step
from bayeslora.generation.groups import by_embedding, by_entailment, exactly
from bayeslora.generation.run import generate, generate_each

__all__ = ["Answer", "Answers", "Step", "by_embedding", "by_entailment", "exactly", "generate", "generate_each"]
