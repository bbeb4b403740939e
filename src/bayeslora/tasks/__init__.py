"""Tasks: rows of data as examples with choices, prompts and splits."""

from bayeslora.tasks.catalogue import KNOWN_TASKS, KnownTask, find_task
from bayeslora.tasks.columns import Columns
from bayeslora.tasks.files import Rows, read_rows
from bayeslora.tasks.load import load_task
from bayeslora.tasks.rows import split_from_rows
from bayeslora.tasks.templates import answer_text, render, resolve_format
from bayeslora.tasks.types import Example, Format, ReadoutName, Split, Task, TaskKind

__all__ = [
    "KNOWN_TASKS",
    "Columns",
    "Example",
    "Format",
    "KnownTask",
    "ReadoutName",
    "Rows",
    "Split",
    "Task",
    "TaskKind",
    "answer_text",
    "find_task",
    "load_task",
    "read_rows",
    "render",
    "resolve_format",
    "split_from_rows",
]
