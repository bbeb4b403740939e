"""The known tasks, one row each: where the data are, which columns hold what, how the text is put; rows of the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bayeslora.errors import InputError, close_matches
from bayeslora.tasks.columns import Columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.types import TaskKind

SplitName = Literal["train", "validation", "test"]
Stems = Mapping[SplitName, tuple[str, ...]]
"""File names without their ending by split, in order of preference."""

# Those in a folder of which nothing more is known.
STEMS: Stems = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class KnownTask:
    """Where one task's data are and what they hold."""

    name: str
    kind: TaskKind  # decides the default templates
    repository: str  # on the Hub
    configs: tuple[str | None, ...]  # loaded one after the other; None for a repository without any
    splits: Mapping[SplitName, str]  # the name on the Hub of each split that the task has
    hub: Columns  # on the Hub; its class names are the task's
    folder: str  # among local data
    stems: Stems  # of the local files; the first that is there is taken
    local: Columns  # of the local files


_QUESTION = Columns(text="question", choices="choices", label="label")

_ALL: Mapping[SplitName, str] = {"train": "train", "validation": "validation", "test": "test"}
_TRAIN_TEST: Mapping[SplitName, str] = {"train": "train", "test": "test"}
# The official test split has no labels.
_VALIDATION_AS_TEST: Mapping[SplitName, str] = {"train": "train", "test": "validation"}

_ARC = Columns(text="question", choices="choices", label="answerKey")
_OPENBOOKQA = Columns(text="question_stem", choices="choices", label="answerKey")
_WINOGRANDE = Columns(text="sentence", choices=("option1", "option2"), label="answer", codes=("1", "2"))
_MMLU = Columns(text="question", choices="choices", label="answer")
_YES_NO = Columns(text="question", label="label", classes=("no", "yes"), codes=("False", "True"))
_BOOLQ = Columns(text="question", label="answer", classes=("no", "yes"), codes=("False", "True"), context="passage")
_SST2 = Columns(text="text", label="label", classes=("negative", "positive"))
_TREC_CLASSES = ("abbreviation", "entity", "description", "human", "location", "number")
_TREC_CODES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
_TREC = Columns(text="text", label="label", classes=_TREC_CLASSES, codes=_TREC_CODES)
_TREC_HUB = Columns(text="text", label="coarse_label", classes=_TREC_CLASSES, codes=_TREC_CODES)


def _winogrande(size: str) -> KnownTask:
    """Return the row of one size of WinoGrande; they differ in the training set only."""
    stems: Stems = {"train": (f"train_{size}",), "test": ("dev",)}
    name = f"winogrande_{size}"
    hub = "allenai/winogrande"
    return KnownTask(name, "blank", hub, (name,), _VALIDATION_AS_TEST, _WINOGRANDE, "winogrande", stems, _QUESTION)


def _mmlu(name: str, subjects: tuple[str, ...], stem: str) -> KnownTask:
    """Return the row of a group of MMLU subjects, which has a test split only."""
    splits: Mapping[SplitName, str] = {"test": "test"}
    return KnownTask(name, "question", "cais/mmlu", subjects, splits, _MMLU, "mmlu", {"test": (stem,)}, _QUESTION)


_ARC_HUB, _OBQA_HUB = "allenai/ai2_arc", "allenai/openbookqa"
_ROWS = (
    _winogrande("xs"),
    _winogrande("s"),
    _winogrande("m"),
    KnownTask("arc_easy", "question", _ARC_HUB, ("ARC-Easy",), _ALL, _ARC, "arc_easy", STEMS, _QUESTION),
    KnownTask("arc_challenge", "question", _ARC_HUB, ("ARC-Challenge",), _ALL, _ARC, "arc_challenge", STEMS, _QUESTION),
    KnownTask("openbookqa", "question", _OBQA_HUB, ("main",), _ALL, _OPENBOOKQA, "openbookqa", STEMS, _QUESTION),
    KnownTask("boolq", "question", "google/boolq", (None,), _VALIDATION_AS_TEST, _BOOLQ, "boolq", STEMS, _YES_NO),
    _mmlu("mmlu_chemistry", ("college_chemistry", "high_school_chemistry"), "mmlu_chemistry"),
    _mmlu("mmlu_physics", ("college_physics", "conceptual_physics", "high_school_physics"), "mmlu_physics"),
    _mmlu("mmlu_biology", ("college_biology", "high_school_biology"), "mmlu_biology"),
    _mmlu(
        "mmlu_cs",
        ("college_computer_science", "high_school_computer_science", "computer_security", "machine_learning"),
        "mmlu_cs",
    ),
    KnownTask("sst2", "class", "SetFit/sst2", (None,), _ALL, _SST2, "sst2", STEMS, _SST2),
    KnownTask("trec", "class", "CogComp/trec", (None,), _TRAIN_TEST, _TREC_HUB, "trec", STEMS, _TREC),
)

KNOWN_TASKS: Mapping[str, KnownTask] = {row.name: row for row in _ROWS}

_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions
"""
MMLU_SUBJECTS = tuple(_SUBJECTS.split())


def find_task(name: str) -> KnownTask | None:
    """Return the known task of a name or ``mmlu:<subject>``, whatever the case and ``-`` for ``_``, or None."""
    plain = name.strip().lower().replace("-", "_")
    group, _, subject = plain.partition(":")
    if group == "mmlu" and subject in MMLU_SUBJECTS:
        return _mmlu(plain, (subject,), subject)
    return KNOWN_TASKS.get(plain)


def unknown_task(name: str, *, also: str = "") -> InputError:
    """Return the error for an unknown name: the closest known names, or else all, and then ``also``."""
    every = [*KNOWN_TASKS, *(f"mmlu:{subject}" for subject in MMLU_SUBJECTS)]
    listed = f"known are {', '.join(KNOWN_TASKS)} and mmlu:<subject>"
    return InputError(f"Unknown task {name!r}: {close_matches(name.lower().replace('-', '_'), every, listed, also)}")


def hub_rows(task: KnownTask, split: SplitName) -> Rows:
    """Load one split of a known task from the Hub, its configurations one after the other."""
    import datasets

    rows: list[Mapping[str, object]] = []
    for config in task.configs:
        try:
            rows.extend(dict(row) for row in _load(task.repository, config, task.splits[split]))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            problem = f"The Hub's {task.repository} could not be loaded for {task.name} ({first})"
            if isinstance(error, ConnectionError):
                problem = f"The Hub could not be reached to load {task.name} ({task.repository})"
            raise InputError(f"{problem}: give data=FOLDER with a local copy") from None
    return Rows(f"{task.repository} {task.splits[split]}", tuple(rows))


def _load(repository: str, config: str | None, split: str) -> Iterable[Mapping[str, object]]:
    """Return the rows of one configuration; where there is only a loading script, those of the Hub's parquet copy."""
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return datasets.load_dataset(repository, config, split=split, revision="refs/convert/parquet")
