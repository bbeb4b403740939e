"""The known tasks, from rows laid out as on the Hub; no network."""

import datasets
import pytest

from bayeslora.errors import InputError
from bayeslora.tasks import KNOWN_TASKS, find_task, load_task
from bayeslora.tasks.catalogue import MMLU_SUBJECTS

Row = dict[str, object]
WINOGRANDE = {"sentence": "Ann met Bo; _ smiled.", "option1": "Ann", "option2": "Bo", "answer": "2"}
ARC = {"id": "M_1", "question": "q?", "choices": {"text": ["1", "2", "3"], "label": ["A", "B", "C"]}, "answerKey": "B"}
OPENBOOKQA = {"id": "7-980", "question_stem": "q?", "choices": ARC["choices"], "answerKey": "B"}
BOOLQ = {"question": "is it", "passage": "It is.", "answer": True}
MMLU = {"question": "q?", "subject": "s", "choices": ["1", "2", "3"], "answer": 1}
SST2 = {"text": "a fine film", "label": 1, "label_text": "positive"}
TREC = {"text": "Who ?", "coarse_label": 1, "fine_label": 3}
LAYOUTS = {
    "winogrande": (WINOGRANDE, "Ann met Bo; _ smiled.", ("Ann", "Bo")),
    "arc": (ARC, "q?", ("1", "2", "3")),
    "openbookqa": (OPENBOOKQA, "q?", ("1", "2", "3")),
    "boolq": (BOOLQ, "It is.\nis it", ("no", "yes")),
    "mmlu": (MMLU, "q?", ("1", "2", "3")),
    "sst2": (SST2, "a fine film", ("negative", "positive")),
    "trec": (TREC, "Who ?", ("abbreviation", "entity", "description", "human", "location", "number")),
}
SPLITS = {
    "winogrande": {"train", "validation"},
    "boolq": {"train", "validation"},
    "mmlu": {"test"},
    "trec": {"train", "test"},
}


def hub(row, calls, count=20):
    def load_dataset(repository, config=None, *, split):
        calls.append((repository, config, split))
        return [row] * count

    return load_dataset


@pytest.mark.parametrize("name", [*KNOWN_TASKS, "mmlu:anatomy"])
def test_every_known_task_reads_the_layout_of_its_repository(name, monkeypatch):
    family = next(key for key in LAYOUTS if name.startswith(key))
    row, text, choices = LAYOUTS[family]
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", hub(row, calls))
    task = load_task(name)
    assert task.test is not None
    example = task.test.examples[0]
    assert (example.text, example.choices, example.label) == (text, choices, 1)
    assert {split for _, _, split in calls} == SPLITS.get(family, {"train", "validation", "test"})
    assert (task.train is None) == (family == "mmlu")
    assert task.test.classes == (choices if family in {"boolq", "sst2", "trec"} else None)


def test_digits_and_letters_are_matched_to_the_choices_own_labels(monkeypatch):
    digits = ARC | {"choices": {"text": ["4", "3", "2"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    monkeypatch.setattr(datasets, "load_dataset", hub(digits, []))
    assert load_task("arc_easy").test.examples[0].label == 2


def test_a_group_of_subjects_is_its_configurations_one_after_the_other(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", hub(MMLU, calls, count=3))
    assert len(load_task("mmlu_cs").test) == 12
    assert [config for _, config, _ in calls] == [
        "college_computer_science",
        "high_school_computer_science",
        "computer_security",
        "machine_learning",
    ]


def test_the_validation_split_of_the_hub_is_used_whole_and_train_is_not_cut(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub(SST2, []))
    task = load_task("sst2")
    assert [len(task.train), len(task.validation), len(task.test)] == [20, 20, 20]


def test_where_validation_serves_as_test_it_is_held_out_of_train(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub(BOOLQ, []))
    task = load_task("boolq")
    assert [len(task.train), len(task.validation), len(task.test)] == [18, 2, 20]


def test_a_repository_with_a_script_is_read_from_its_parquet_copy(monkeypatch):
    revisions = []

    def load_dataset(repository, config, *, split, revision=None):
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        return [TREC] * 4

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("trec").test.examples[0].label == 1
    assert revisions == [None, "refs/convert/parquet"] * 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it"), "The Hub could not be reached"),
        (datasets.exceptions.DatasetNotFoundError("It does not exist.\nmore"), "could not be loaded"),
        (datasets.exceptions.DatasetGenerationError("An error occurred"), "could not be loaded"),
        (ValueError("Unknown split"), "could not be loaded"),
        (RuntimeError("something else"), "could not be loaded"),
    ],
)
def test_a_failure_of_the_hub_is_one_sentence_that_offers_a_folder(error, said, monkeypatch):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_task("openbookqa")
    assert said in str(caught.value)
    assert "data=FOLDER" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_found_whatever_their_case_and_dashes():
    assert find_task("ARC-Easy") is KNOWN_TASKS["arc_easy"]
    assert find_task("mmlu:nothing") is None


def test_there_are_57_distinct_subjects():
    assert len(set(MMLU_SUBJECTS)) == len(MMLU_SUBJECTS) == 57
    assert {c for row in KNOWN_TASKS.values() if row.folder == "mmlu" for c in row.configs} < set(MMLU_SUBJECTS)


@pytest.mark.parametrize(
    ("name", "said"), [("openbokqa", "openbookqa"), ("mmlu:anatomi", "mmlu:anatomy"), ("zzz", "winogrande_s")]
)
def test_an_unknown_task_is_refused_with_names_that_are_known(name, said):
    with pytest.raises(InputError, match=f"Unknown task '{name}'.*{said}"):
        load_task(name)
