"""Options: where they come from, what wrong ones say, and that the documents agree with them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from pipeserve.config import Config, load_config
from pipeserve.errors import ConfigError

ROOT = Path(__file__).parent.parent


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_the_command_line_goes_before_the_environment_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "port = 1\nhost = 'file'\nblock_size = 8\n")
    environ = {"PIPESERVE_PORT": "2", "PIPESERVE_HOST": "environment"}
    config = load_config(overrides={"port": "3"}, config_file=path, environ=environ)
    assert (config.port, config.host, config.block_size) == (3, "environment", 8)
    assert config.max_num_seqs == Config.model_fields["max_num_seqs"].default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", r"unknown option 'prot' in .*config.toml; the nearest known is port"),
        ("port = 'x'", r"port = 'x': .*valid integer"),
        ("port = 70000", r"port = 70000: .*less than or equal to 65535"),
        ("devices = ['gpu']", r"devices = .*'gpu' is none of cpu, cuda:N"),
        ("devices = []", r"devices = .*at least one device"),
        ("devices = ['cpu', 'auto']", r"devices = .*'auto' is none of"),
        ("kv_cache_bytes = '4 bananas'", r"kv_cache_bytes = '4 bananas'"),
        ("devices = ['cpu', 'cpu']\nlayer_split = [30]", r"layer_split has 1 parts but devices"),
        (
            "devices = ['cpu', 'cpu']\nreplicas = 2\nlayer_split = [10, 20]",
            r"layer_split has 2 parts but each of 2 replicas has 1 stages",
        ),
        ("devices = ['cpu', 'cpu']\nreplicas = 3", r"replicas is 3, which does not divide the 2"),
        ("devices = ['cpu', 'cpu']\nstages = 3", r"stages is 3, which does not divide the 2"),
        (
            "devices = ['cpu', 'cpu']\nreplicas = 2\nstages = 2",
            r"replicas = 2 times stages = 2 is 4, but there are 2 devices",
        ),
        (
            "devices = ['cpu', 'cpu']\nlayout = 'pipeline'\nstages = 1",
            r"layout is 'pipeline', .* ask for 2 replicas; leave layout out",
        ),
        ("layout = 'ring'", r"layout = 'ring': .*'auto', 'pipeline' or 'replicas'"),
        ("weights = 'q4'", r"weights = 'q4': .*'quantised', 'both', 'bf16' or 'fp8'"),
        ("weights = 'fp8'\nactivations = 'int8'", r"activations is 'int8' and weights 'fp8'"),
        ("port = ", r"config.toml is not valid TOML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides={}, config_file=written(tmp_path, text), environ={})


def test_an_unknown_environment_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the nearest known is max_num_seqs"):
        load_config(overrides={}, environ={"PIPESERVE_MAX_SEQS": "3"})
    load_config(overrides={}, environ={"PIPESERVE_REQUIRE_CUDA": "1", "OTHER": "x"})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*No such file"):
        load_config(overrides={}, config_file=tmp_path / "none.toml", environ={})


def test_lists_and_sizes_in_text() -> None:
    config = load_config(
        overrides={"devices": "cpu, cpu", "layer_split": "17,13", "kv_cache_bytes": "2GiB"},
        environ={},
    )
    assert config.devices == ("cpu", "cpu")
    assert config.layer_split == (17, 13)
    assert config.kv_cache_bytes == 2 * 1024**3


def example_entries() -> dict[str, tuple[str, bool, str]]:
    """option -> (comment, is commented out, value as TOML) of config.example.toml."""
    text = (ROOT / "config.example.toml").read_text()
    entries = {}
    for paragraph in text.split("\n\n")[1:]:
        *comment, last = paragraph.strip().splitlines()
        match = re.fullmatch(r"(# )?(\w+) = (.+)", last)
        assert match, f"no option at the end of {paragraph!r}"
        joined = " ".join(line.removeprefix("# ") for line in comment)
        entries[match[2]] = (joined, match[1] is not None, match[3])
    return entries


def test_the_example_file_holds_every_option_with_its_default_and_comment() -> None:
    entries = example_entries()
    assert list(entries) == list(Config.model_fields)
    for name, (comment, is_unset, toml_value) in entries.items():
        field = Config.model_fields[name]
        assert comment == field.description, name
        value = tomllib.loads(f"x = {toml_value}")["x"]
        if is_unset:
            assert field.default_factory or field.default is None, f"{name} has a default"
            TypeAdapter(field.annotation).validate_python(value)
        else:
            assert load_config(overrides={name: value}, environ={}) == Config(), name


def test_the_readme_lists_every_option_as_it_is() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Options\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?(.+?)`? \| (.+) \|$", section, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == list(Config.model_fields)
    for name, default, meaning in rows:
        field = Config.model_fields[name]
        assert meaning == field.description, name
        if field.default_factory is None:
            values = {} if default == "-" else {name: default}
            assert load_config(overrides=values, environ={}) == Config(), name
