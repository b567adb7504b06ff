"""Settings: where a value comes from, and what is refused with which words."""

import gc
import json
from dataclasses import asdict

import pytest
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st

from config import ModelConfig, TrainConfig, from_dict, load_config, nearest, read_json
from flags import Parser, what_there_is
from script import InputError, before_imports, note, run_script


@pytest.fixture
def write(tmp_path):
    """Write a JSON value, or a raw string or bytes, to a file; return its path."""
    def make(content, name="config.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)
    return make


def test_a_value_comes_from_the_flag_then_the_file_then_the_default(write):
    config = load_config(TrainConfig, write({"batch_size": 7, "beta1": 0.5}), {"beta1": 0.6})
    assert (config.beta1, config.batch_size, config.beta2) == (0.6, 7, 0.99)


def test_the_defaults_are_the_documented_ones():
    assert asdict(ModelConfig()).items() >= dict(
        block_size=256, vocab_size=10000, n_layer=4, n_head=4, n_embd=256, dropout=0.0, bias=False,
        use_rope=True, norm_eps=1e-5, is_causal=True).items()
    assert asdict(TrainConfig()).items() >= dict(
        dropout=0.0, learning_rate=6e-4, weight_decay=1e-1, beta1=0.9, beta2=0.99, decay_lr=True,
        warmup_iters=300, lr_decay_iters=100000, min_lr=6e-5, batch_size=100, random_seed=1337,
        dataset_path=[], eval_interval=100, log_interval=1, eval_iters=5, backend="nccl", device="cuda",
        sdp_kernel="flash", dtype="bfloat16", grad_clip=1.0, gradient_accumulation_steps=4).items()


@pytest.mark.parametrize("name, cls", [("model_config.json", ModelConfig),
                                       ("config_pretrain.json", TrainConfig),
                                       ("config_sft.json", TrainConfig)])
def test_the_shipped_files_are_valid_and_hold_no_persons_paths(name, cls):
    config = load_config(cls, str(REPO / name))
    texts = [config.from_checkpoint, *sum(config.dataset_path, [])] if cls is TrainConfig else []
    assert not any(text.startswith(("/", "~")) or ":" in text for text in texts)


def test_a_config_survives_the_way_through_a_dict(write):
    config = load_config(TrainConfig, write({"dataset_path": [["a", "b"], ["c", "d"]], "max_minutes": 3}))
    assert from_dict(TrainConfig, json.loads(json.dumps(asdict(config))), "x") == config
    assert config.max_minutes == 3.0 and isinstance(config.max_minutes, float)


@pytest.mark.parametrize("values, message", [
    ({"learning_rat": 1}, 'unknown key "learning_rat"; did you mean "learning_rate"?'),
    ({"zzz": 1}, 'unknown key "zzz"$'),
    ({"batch_size": "4"}, "batch_size is '4', but must be of type int"),
    ({"batch_size": 4.0}, "batch_size is 4.0, but must be of type int"),
    ({"batch_size": True}, "batch_size is True, but must be of type int"),
    ({"batch_size": None}, "batch_size is None, but must be of type int"),
    ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', but must be of type float"),
    ({"decay_lr": 1}, "decay_lr is 1, but must be of type bool"),
    ({"device": 0}, "device is 0, but must be of type str"),
    ({"optimizer": "adam"}, "optimizer is 'adam', but must be one of adamw, muon; did you mean .adamw."),
    ({"dtype": 16}, "dtype is 16, but must be one of bfloat16, float16, float32"),
    ({"dataset_path": "a.npy"}, "dataset_path must be a list of pairs"),
    ({"dataset_path": [["a.npy"]]}, "dataset_path must be a list of pairs"),
    ({"dataset_path": [["a.npy", 3]]}, "dataset_path must be a list of pairs"),
    ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
    ({"batch_size": -3}, "batch_size is -3, but must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, but must be at least 1"),
    ({"learning_rate": 0}, "learning_rate is 0.0, but must be above 0"),
    ({"learning_rate": -1e-3}, "learning_rate is -0.001, but must be above 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"grad_clip": -1}, "grad_clip is -1.0, but must be at least 0"),
    ({"dropout": 1.0}, "dropout is 1.0, but must be below 1"),
    ({"dropout": -0.1}, "dropout is -0.1, but must be at least 0"),
    ({"beta1": 1.5}, "beta1 is 1.5, but must be below 1"),
    ({"random_seed": -1}, "random_seed is -1, but must be at least 0"),
    ({"random_seed": 2**64}, "random_seed is 18446744073709551616, but must be below"),
    ({"eval_interval": 0}, "eval_interval is 0"),
    ({"log_interval": 0}, "log_interval is 0"),
    ({"save_interval": 0}, "save_interval is 0"),
    ({"eval_iters": 0}, "eval_iters is 0"),
    ({"max_steps": -1}, "max_steps is -1"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"min_lr": 1.0}, "min_lr 1 is above learning_rate 0.0006"),
    ({"lr_decay_iters": 0}, "lr_decay_iters 0 means max_steps or max_minutes, but neither is set"),
])
def test_a_bad_training_setting_is_named(write, values, message):
    path = write(values)
    with pytest.raises(InputError, match=message) as error:
        load_config(TrainConfig, path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize("values, message", [
    ({"n_embed": 64}, 'unknown key "n_embed"; did you mean "n_embd"?'),
    ({"n_embd": 30}, "n_embd 30 is not divisible by n_head 4"),
    ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
    ({"n_embd": 12}, "use_rope needs an even head size, but n_embd / n_head is 3"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": -256}, "n_embd is -256"),
    ({"block_size": 0}, "block_size is 0"),
    ({"n_kv_head": -1}, "n_kv_head is -1"),
    ({"norm_eps": 0}, "norm_eps is 0.0"),
    ({"rope_theta": -1}, "rope_theta is -1.0"),
    ({"activation": "swish"}, "activation is 'swish'"),
    ({"final_norm": "batchnorm"}, "final_norm is 'batchnorm'"),
    ({"is_causal": "yes"}, "is_causal is 'yes'"),
])
def test_a_bad_model_setting_is_named(write, values, message):
    path = write(values)
    with pytest.raises(InputError, match=message) as error:
        load_config(ModelConfig, path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_an_odd_head_size_is_fine_without_rope(write):
    assert load_config(ModelConfig, write({"n_embd": 12, "use_rope": False})).n_embd == 12


@pytest.mark.parametrize("content, message", [
    ("", "line 1: not valid JSON"),
    ('{\n"batch_size": 4,\n}', "line 3: not valid JSON"),
    ("[1, 2]", "must hold a JSON object"),
    ("7", "must hold a JSON object"),
    (b'{"device": "\xff"}', "not UTF-8 at byte 12"),
    ("[" * 100000, "not valid JSON .*recursion"),
    ('{"batch_size": ' + "9" * 5000 + "}", "not valid JSON"),
])
def test_a_file_that_is_no_json_object_is_named_with_its_line(write, content, message):
    path = write(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    for path, message in ((tmp_path / "gone.json", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_json(str(path))


def test_a_byte_order_mark_is_read_over(write):
    assert read_json(write(b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize("words, message", [
    (["--learning_rat", "1"], "--learning_rat 1; did you mean \"--learning_rate\""),
    (["--max_step", "1"], '--max_step 1; did you mean "--max_steps"?'),
    (["--steps=5"], '--steps=5; did you mean "--max_steps"?'),
    (["--foo"], "unrecognized arguments: --foo (see --help)"),
    (["--batch_size", "four"], "argument --batch_size: invalid int value: 'four'"),
    (["--batch_size", "0"], "batch_size is 0, but must be at least 1"),
    (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
    (["--dataset_path", "a.npy"], "argument --dataset_path"),
    (["--dataset_path", '[["a.npy"]]'], "dataset_path must be a list of pairs"),
    (["--decay_lr", "maybe"], "argument --decay_lr"),
    (["--n_head", "5"], "n_embd 32 is not divisible by n_head 5"),
    (["-t", "chat"], "argument -t/--task: invalid choice: 'chat'"),
    (["--train_config", "gone.json"], "gone.json: no such file"),
])
def test_a_mistake_on_the_command_line_is_one_line(workspace, words, message):
    assert message in workspace.refused_training(*words)


def test_flags_reach_both_configs_and_override_the_files(workspace):
    pair = ["dataset/sft_val.npy", "dataset/sft_train.npy"]
    args = workspace.arguments("-t", "sft", "--n_layer", "3", "--learning_rate", "2e-3", "--compile",
                               "--decay_lr", "false", "--dataset_path", json.dumps([pair]),
                               "--from_checkpoint", "latest")
    assert args.model.n_layer == 3 and args.model.n_embd == 32
    assert args.train.learning_rate == 2e-3 and args.train.compile == "true" and not args.train.decay_lr
    assert args.train.dataset_path == [pair] and args.train.batch_size == 4
    assert args.model_flags == {"n_layer": 3}


@pytest.mark.parametrize("words, expected", [
    ([], 20), (["--max_steps", 21], 20), (["--max_steps", 20], 2), (["--max_steps", 10], 1),
    (["--max_steps", 9], 0), (["--max_steps", 5, "--lr_decay_iters", 30], 20),
    (["--max_steps", 5, "--decay_lr", "false"], 20), (["--max_steps", 10, "--warmup_iters", 4], 4),
    (["--max_steps", 0, "--max_minutes", 1], 20)])
def test_a_warm_up_of_the_file_that_outlasts_the_decay_is_shortened_with_one_line(workspace, capsys, words,
                                                                                  expected):
    workspace.configure("config_pretrain.json", warmup_iters=20, max_steps=200)
    note.cache_clear()
    assert workspace.arguments(*words).train.warmup_iters == expected
    said = capsys.readouterr().err.splitlines()
    if expected in (20, 4):
        assert not said
    else:
        assert len(said) == 1 and said[0].startswith(f"note: warmup_iters {expected} instead of 20")


FIXED = ["pretrain_best.pt", "pretrain_last.pt", "sft_best.pt"]
DATED = [f"pretrain_202611{day}_102506_best.pt" for day in range(10, 20)]


@pytest.mark.parametrize("wanted, names, expected", [
    ("gone.pt", [], "; train a model first (python train.py)"),
    ("gone.pt", FIXED + DATED, "; there are " + ", ".join(
        f"checkpoint/{name}" for name in [*FIXED, *DATED[:4:-1]])),  # the newest first
    (DATED[3], FIXED + DATED, f"; did you mean checkpoint/{DATED[3]}?"),
    ("sft_best.pt", FIXED + DATED, "; did you mean checkpoint/sft_best.pt?"),
    ("sft_bset.pt", FIXED + DATED, "; did you mean checkpoint/sft_best.pt?"),
    ("checkpoint/pretrain_lats.pt", FIXED + DATED, "; did you mean checkpoint/pretrain_last.pt?"),
])
def test_a_missing_checkpoint_is_answered_with_the_nearest_or_with_those_there_are(tmp_path, wanted, names,
                                                                                   expected):
    (tmp_path / "checkpoint").mkdir()
    for name in names:
        (tmp_path / "checkpoint" / name).touch()
    assert what_there_is(wanted, str(tmp_path)) == expected


def test_a_run_that_lacks_its_best_checkpoint_is_told_of_the_last(workspace):
    words = ["-t", "sft", "--from_checkpoint", "checkpoint/pretrain_best.pt"]
    assert "train a model first" in workspace.refused_training(*words)
    (workspace.path / "checkpoint" / "pretrain_last.pt").touch()
    line = workspace.refused_training(*words)
    assert line.endswith("start from the last one instead: --from_checkpoint checkpoint/pretrain_last.pt")


def test_a_warm_up_of_the_command_line_that_outlasts_the_decay_is_refused(workspace):
    for words in (["--max_steps", 10], ["--lr_decay_iters", 10, "--max_steps", 100]):
        line = workspace.refused_training(*words, "--warmup_iters", 10)
        assert "warmup_iters 10 must be below the step at which the decay ends (10" in line


def test_the_shipped_files_need_no_second_flag_for_a_short_trial(capsys):
    for name in ("config_pretrain.json", "config_sft.json"):
        for steps in range(1, 200):
            config = load_config(TrainConfig, str(REPO / name), {"max_steps": steps})
            assert config.warmup_iters < steps
        shipped = json.loads((REPO / name).read_text())["warmup_iters"]
        assert load_config(TrainConfig, str(REPO / name), {"max_steps": shipped + 1}).warmup_iters == shipped


def test_every_field_has_a_flag_and_a_help_text():
    parser = Parser("").add_config(TrainConfig).add_config(ModelConfig)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for cls in (TrainConfig, ModelConfig):
        assert {f"--{name}" for name in cls.__dataclass_fields__} <= flags
        assert all(f.metadata["help"] for f in cls.__dataclass_fields__.values())
    assert "learning_rate" in parser.format_help()


def test_nearest_names_a_close_word_and_no_far_one():
    assert nearest("drop_out", ["dropout", "dtype"]) == '; did you mean "dropout"?'
    assert nearest("xyz", ["dropout", "dtype"]) == ""


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                           lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
names = {cls: st.sampled_from(sorted(cls.__dataclass_fields__)) for cls in (ModelConfig, TrainConfig)}


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig])
@given(data=st.data())
def test_any_json_gives_a_valid_config_or_one_line(cls, data):
    """Whatever value stands under a known key: no other exception, and what is accepted has its type."""
    values = data.draw(st.dictionaries(names[cls] | st.text(max_size=3), json_values, max_size=4))
    try:
        config = from_dict(cls, values, "here").validate("here")
    except InputError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
    else:
        assert all(type(value) is type(getattr(cls(), name)) for name, value in asdict(config).items())


@given(text=st.text(st.characters(codec="utf-8")) | st.text('{}[]":,0123456789eE.-nultr\\ '))
def test_any_text_is_a_json_object_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(read_json(str(path)), dict)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_the_garbage_collector_is_off_while_a_script_imports_and_no_longer(capsys):
    try:
        before_imports(lambda: None)
        assert not gc.isenabled()
        with pytest.raises(SystemExit):
            run_script(lambda: print(gc.isenabled()))
        assert capsys.readouterr().out == "True\n" and gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_mistake_ends_a_script_before_its_imports(capsys):
    def mistaken():
        raise InputError("batch_size is 0")

    with pytest.raises(SystemExit) as ended:
        before_imports(mistaken)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: batch_size is 0\n"
    assert gc.isenabled()
