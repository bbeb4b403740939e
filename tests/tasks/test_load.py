"""Tasks from folders and files: where they are found, and how they are split."""

import csv
import json
import os
from pathlib import Path

import datasets
import pytest

from bayeslora.errors import InputError
from bayeslora.tasks import KNOWN_TASKS, Columns, load_task, render, resolve_format

QUESTION = [{"question": f"q{i}?", "choices": ["no", "yes", "so"], "label": i % 3} for i in range(40)]
YES_NO = [{"question": f"q{i}", "label": i % 2} for i in range(40)]
SENTIMENT = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
CODES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
TOPIC = [{"text": f"t{i}", "label": CODES[i % 6]} for i in range(40)]
REVIEWS = [{"review": f"r{i}", "stars": (1, 2, 4, 10)[i % 4]} for i in range(40)]
STARS = {"text": "review", "label": "stars"}


def rows_of(name):
    return {"boolq": YES_NO, "sst2": SENTIMENT, "trec": TOPIC}.get(name, QUESTION)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(split):
    return [] if split is None else [example.text for example in split]


@pytest.fixture
def reviews(tmp_path):
    write(tmp_path / "reviews" / "train.jsonl", REVIEWS)
    write(tmp_path / "reviews" / "test.jsonl", REVIEWS[:8])
    return tmp_path / "reviews"


@pytest.mark.parametrize("place", ["above", "inside", "named"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("name", KNOWN_TASKS)
def test_every_known_task_is_found_in_a_folder(tmp_path, name, ending, place):
    known = KNOWN_TASKS[name]
    stems = {split: stems[0] for split, stems in known.stems.items()}
    folder = tmp_path / known.folder
    if place == "named":
        folder, stems = tmp_path / name, {"test": "test"} | ({"train": "train"} if "train" in known.splits else {})
    for stem in stems.values():
        write(folder / f"{stem}.{ending}", rows_of(name))
    task = load_task(name, folder if place == "inside" else tmp_path)
    assert texts(task.test) == [row.get("question", row.get("text")) for row in rows_of(name)]
    label = rows_of(name)[1]["label"]
    assert task.test.examples[1].label == (CODES.index(label) if label in CODES else label)
    assert task.test.classes == known.hub.classes
    assert (task.train is None) == ("train" not in known.splits)
    assert (task.name, task.test.name, task.test.format.kind) == (name, f"{name}/test", known.kind)


def test_parquet_of_the_hub_layout_is_read_from_a_folder(tmp_path):
    row = {"question_stem": "q?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"}
    write(tmp_path / "openbookqa" / "test.parquet", [row])
    assert load_task("openbookqa", tmp_path).test.examples[0].label == 1


def test_winogrande_sizes_share_dev_as_their_test_split(tmp_path):
    for stem, count in (("train_s", 20), ("train_m", 40), ("dev", 10)):
        write(tmp_path / "winogrande" / f"{stem}.jsonl", QUESTION[:count])
    for name, count in (("winogrande_s", 20), ("winogrande_m", 40)):
        task = load_task(name, tmp_path, validation=0)
        assert (len(task.train), task.validation, len(task.test)) == (count, None, 10)


def test_dev_is_the_validation_split_elsewhere_and_is_kept_whole(tmp_path):
    for stem, count in (("train", 40), ("dev", 7), ("test", 9)):
        write(tmp_path / "sst2" / f"{stem}.jsonl", SENTIMENT[:count])
    task = load_task("sst2", tmp_path, validation=0.5)
    assert [len(task.train), len(task.validation), len(task.test)] == [40, 7, 9]
    assert task.validation.name == "sst2/validation"


def test_a_folder_of_ones_own_gives_classes_in_the_order_of_their_numbers(reviews):
    task = load_task(data=reviews, columns=STARS)
    assert (task.name, task.test.classes) == ("reviews", ("1", "2", "4", "10"))
    assert task.test.labels.tolist() == [0, 1, 2, 3] * 2
    assert task.test.format.kind == "class"


def test_class_names_may_be_given_with_the_codes_that_labels_use(reviews):
    names = ["awful", "bad", "good", "great"]
    task = load_task(data=reviews, columns=STARS | {"classes": names, "codes": [1, 2, 4, 10]})
    assert (task.test.classes, task.test.labels.tolist()) == (tuple(names), [0, 1, 2, 3] * 2)


def test_a_label_that_train_does_not_have_is_refused_in_test(reviews):
    write(reviews / "test.jsonl", [{"review": "r", "stars": 3}])
    with pytest.raises(
        InputError, match=r"test\.jsonl line 1: the label '3' is out of range: it should be one of 1, 2"
    ):
        load_task(data=reviews, columns=STARS)


@pytest.mark.parametrize("choices", ["opts", ["a", "b", "c"]])
def test_choices_of_ones_own_may_be_a_list_or_columns(tmp_path, choices):
    rows = [{"q": "x", "opts": ["one", "two", "six"], "a": "one", "b": "two", "c": "six", "k": key} for key in "ABC"]
    file = write(tmp_path / "mine.csv", rows)
    task = load_task(data=file, columns={"text": "q", "choices": choices, "label": "k"})
    assert (task.name, task.train, task.test.classes, task.test.format.kind) == ("mine", None, None, "question")
    assert task.test.labels.tolist() == [0, 1, 2]
    assert task.test.examples[0].choices == ("one", "two", "six")


def test_ones_own_data_need_no_columns_where_the_usual_names_are_used(tmp_path):
    assert load_task(data=write(tmp_path / "a.jsonl", QUESTION)).test.classes is None
    assert load_task(data=write(tmp_path / "b.jsonl", SENTIMENT)).test.classes == ("0", "1")


def test_columns_change_only_what_they_name_of_a_known_task(tmp_path):
    file = write(tmp_path / "f.jsonl", [{"line": "x", "label": 1}])
    assert load_task("sst2", file, columns={"text": "line"}).test.classes == ("negative", "positive")


def test_a_single_file_is_a_test_split_or_training_rows(tmp_path):
    file = write(tmp_path / "f.jsonl", SENTIMENT)
    task = load_task(data=file)
    assert (task.train, task.validation, len(task.test)) == (None, None, 40)
    task = load_task(data=file, file_as="train")
    assert (len(task.train), len(task.validation), task.test) == (36, 4, None)


def test_a_test_file_may_lack_labels_unless_they_are_named(tmp_path):
    file = write(tmp_path / "f.jsonl", [{"text": "x"}])
    assert load_task("sst2", file).test.labels.tolist() == [-1]
    with pytest.raises(InputError, match="no column 'stars': its columns are text"):
        load_task("sst2", file, columns={"label": "stars"})


def test_a_columns_value_is_taken_as_it_is(reviews):
    assert len(load_task(data=reviews, columns=Columns(text="review", label="stars")).test.classes) == 4


def test_train_validation_and_few_shot_share_no_row_and_lose_none(reviews):
    task = load_task(data=reviews, columns=STARS, validation=5, few_shot=3)
    shots = [example.text for example in task.test.format.few_shot]
    assert (len(task.train), len(task.validation), len(shots)) == (32, 5, 3)
    assert sorted(texts(task.train) + texts(task.validation) + shots) == sorted(row["review"] for row in REVIEWS)
    assert task.train.format == task.validation.format == task.test.format


def test_rows_keep_the_order_of_the_source(reviews):
    task = load_task(data=reviews, columns=STARS, train_rows=9, test_rows=4)
    order = [row["review"] for row in REVIEWS]
    for split in (task.train, task.validation, task.test):
        assert texts(split) == sorted(texts(split), key=order.index)
    assert len(task.test) == 4


def test_held_out_and_prompt_rows_do_not_depend_on_later_options(reviews):
    first = load_task(data=reviews, columns=STARS, seed=3, few_shot=2)
    later = load_task(data=reviews, columns=STARS, seed=3, few_shot=2, train_rows=5, test_rows=2, max_length=9)
    assert texts(first.validation) == texts(later.validation)
    assert first.test.format.few_shot == later.test.format.few_shot
    plain = load_task(data=reviews, columns=STARS, seed=3, train_rows=5)
    assert texts(plain.validation) == texts(later.validation)
    assert texts(plain.train) == texts(later.train)


def test_fewer_rows_are_a_subset_of_more(reviews):
    few, more = (load_task(data=reviews, columns=STARS, train_rows=n, test_rows=n) for n in (3, 6))
    assert set(texts(few.train)) < set(texts(more.train))
    assert set(texts(few.test)) < set(texts(more.test))


def test_asking_for_more_rows_than_there_are_gives_all(reviews):
    task = load_task(data=reviews, columns=STARS, train_rows=999, test_rows=999)
    assert (len(task.train), len(task.test)) == (36, 8)


def test_the_seed_alone_decides_which_rows(reviews):
    held = [texts(load_task(data=reviews, columns=STARS, seed=seed).validation) for seed in (0, 0, 1)]
    assert held[0] == held[1]
    assert held[0] != held[2]


def test_format_carries_the_options(reviews):
    task = load_task(data=reviews, columns=STARS, readout="head", template="R: {text}", max_length=7, few_shot=1)
    fmt = task.train.format
    assert (fmt.readout, fmt.template, fmt.max_length, len(fmt.few_shot)) == ("head", "R: {text}", 7, 1)


def test_likelihood_few_shot_prompt_names_the_class(tmp_path):
    write(tmp_path / "trec" / "train.jsonl", TOPIC[:6])
    write(tmp_path / "trec" / "test.jsonl", [{"text": "Who ?", "label": "HUM"}])
    test = load_task("trec", tmp_path, few_shot=1, validation=0).test
    shot = test.format.few_shot[0]
    said = render(test.examples[0], resolve_format(test, "likelihood"))
    assert said == f"Text: {shot.text}\nLabel: {test.classes[shot.label]}\n\nText: Who ?\nLabel:"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"few_shot": -1}, "few_shot is -1"),
        ({"train_rows": 0}, "train_rows is 0"),
        ({"test_rows": -2}, "test_rows is -2"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": -1}, "validation is -1"),
        ({"validation": 40}, "leave none to train on"),
        ({"few_shot": 36}, "leave none to train on"),
        ({"readout": "letter"}, "readout 'letter' is unknown"),
        ({"template": ""}, "template is empty"),
        ({"template": "x"}, "no {text}"),
        ({"template": "{text}", "readout": "letters"}, "no {choices}"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_an_option_without_a_meaning_is_refused(reviews, options, said):
    with pytest.raises(InputError) as caught:
        load_task(data=reviews, columns=STARS, **options)
    assert said in str(caught.value)


def test_few_shot_is_refused_where_there_are_no_training_rows(tmp_path):
    write(tmp_path / "mmlu" / "mmlu_cs.jsonl", QUESTION)
    with pytest.raises(InputError, match="mmlu_cs has none"):
        load_task("mmlu_cs", tmp_path, few_shot=1)


def test_data_that_are_not_there_are_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="no file or folder"):
        load_task("sst2", tmp_path / "gone")
    with pytest.raises(InputError, match=r"train_s, dev in .*winogrande"):
        load_task("winogrande_s", tmp_path)
    with pytest.raises(InputError, match="train, validation, valid, val, dev, test in"):
        load_task(data=tmp_path)
    with pytest.raises(InputError, match="Unknown task 'sst22': did you mean sst2"):
        load_task("sst22", tmp_path)
    with pytest.raises(InputError, match="a task or data"):
        load_task()


def test_an_unknown_file_role_and_an_empty_file_are_refused(tmp_path):
    file = write(tmp_path / "f.jsonl", QUESTION)
    with pytest.raises(InputError, match="file_as"):
        load_task(data=file, file_as="validation")
    with pytest.raises(InputError, match="has no rows"):
        load_task("openbookqa", write(tmp_path / "e.jsonl", []))


def test_training_rows_need_labels(tmp_path):
    write(tmp_path / "sst2" / "train.jsonl", [{"text": "x"}, {"text": "y"}])
    with pytest.raises(InputError, match="no column 'label'"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize("name", KNOWN_TASKS)
def test_the_published_data_load_without_losing_a_row(name):
    folder = os.environ.get("BAYESLORA_DATA")
    if folder is None:
        pytest.skip("set BAYESLORA_DATA to a folder with the data")
    known = KNOWN_TASKS[name]
    task = load_task(name, folder)
    for split, loaded in (("train", [*texts(task.train), *texts(task.validation)]), ("test", texts(task.test))):
        stems = known.stems.get(split, ())
        files = [path for stem in stems if (path := Path(folder) / known.folder / f"{stem}.jsonl").exists()]
        own = (Path(folder) / known.folder / "dev.jsonl").exists() and split == "train" and name == "sst2"
        wanted = sum(len(path.read_text().strip().split("\n")) for path in files)
        assert len(loaded) == wanted + (len(task.validation) if own else 0)
    assert (task.test.labels >= 0).all()


NLI = [
    {"premise": f"It rains {i}.", "hypothesis": f"It is wet {i}.", "note": 3 + i, "label": ("yes", "no")[i % 2]}
    for i in range(12)
]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_template_takes_any_column_of_the_data_and_no_text_is_needed(tmp_path, ending):
    if ending == "csv":
        cells = [",".join(str(v) for v in row.values()) for row in NLI]
        (tmp_path / "train.csv").write_text("\n".join([",".join(NLI[0]), *cells]) + "\n")
    else:
        write(tmp_path / "train.jsonl", NLI)
    template = "{premise}\nQuestion: {hypothesis} ({note})\nAnswer:"
    task = load_task(data=tmp_path, template=template, readout="likelihood", few_shot=1, validation=2)
    fmt = resolve_format(task.train, "likelihood")
    shot, first = fmt.few_shot[0], task.train.examples[0]
    number = int(first.columns[2][1]) - 3
    assert task.train.classes == ("no", "yes")
    assert render(first, fmt).endswith(f"\n\nIt rains {number}.\nQuestion: It is wet {number}. ({3 + number})\nAnswer:")
    assert shot.columns[0][1].startswith("It rains")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{premise} {hypotesis}", "train.jsonl line 1 has no column 'hypotesis', which the template names: its columns "
         "are premise, hypothesis, note, label"),
        ("{premise} {label}", "{label}, which is the column of the label"),
        ("{premise} {text}", "no column 'text'"),
    ],
)  # fmt: skip
def test_a_template_that_the_data_cannot_fill_is_refused_with_their_columns(tmp_path, template, said):
    write(tmp_path / "train.jsonl", NLI)
    with pytest.raises(InputError) as caught:
        load_task(data=tmp_path, template=template)
    assert said in str(caught.value)


def test_a_column_that_holds_no_text_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", [NLI[0], NLI[1] | {"note": ["x"]}])
    with pytest.raises(InputError, match=r"line 2: the column 'note' is \['x'\]"):
        load_task(data=tmp_path, template="{premise} {note}", validation=0)


def test_the_normalisation_is_part_of_the_format_and_an_unknown_one_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", NLI)
    usual = {"data": tmp_path, "template": "{premise}"}
    found = load_task(**usual, readout="likelihood", normalisation="tokens")
    assert {s.format.normalisation for s in (found.train, found.validation)} == {"tokens"}
    assert load_task(**usual, readout="likelihood").train.format.normalisation == "tokens"
    assert load_task(**usual, readout="head").train.format.normalisation == "sum"
    with pytest.raises(InputError, match="'bytes' is unknown: give one of sum, characters, tokens, unconditional"):
        load_task(**usual, normalisation="bytes")
    with pytest.raises(InputError, match="'letters' has no normalisation 'tokens'"):
        load_task(data=tmp_path, template="{premise} {choices}", readout="letters", normalisation="tokens")


def test_a_normalisation_that_the_chosen_readout_would_not_have_is_refused(tmp_path):
    write(tmp_path / "quiz" / "test.jsonl", [{"question": "q", "choices": ["a", "b"], "label": 0}] * 2)
    assert load_task(data=tmp_path / "quiz").normalisation is None
    with pytest.raises(InputError, match="which 'auto' does not choose for quiz: add readout='likelihood'"):
        load_task(data=tmp_path / "quiz", normalisation="characters")
