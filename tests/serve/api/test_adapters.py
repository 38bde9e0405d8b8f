"""Models and adapters: listed, loaded, unloaded, pinned, given further names; vLLM's endpoints for the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.http_world import BASE, Running, World, error_of, save_adapter


@pytest.fixture
def world(own_folder: Path) -> Iterator[World]:
    with Running(own_folder) as running:
        yield running


def test_models(world: World) -> None:
    listed = {model["id"]: model for model in world.get("/v1/models").json()["data"]}
    assert set(listed) == {BASE, "sql", "style", "acme-secret"}
    base = listed[BASE]
    assert base["parent"] is None
    assert base["max_model_len"] == 1024
    assert len(base["digest"]) == 64
    assert listed["sql"]["parent"] == BASE
    assert listed["sql"]["digest"] is None  # nobody has read it yet
    world.ask("sql")
    one = world.get("/v1/models/sql").json()
    assert one["root"] == "sql"
    assert len(one["digest"]) == 64
    assert world.get(f"/v1/models/{BASE}").json() == base
    assert error_of(world.get("/v1/models/nope"))[:3] == (404, "not_found_error", "model_not_found")


def test_load_show_and_unload(world: World) -> None:
    answer = world.post("/v1/adapters", {"name": "mine", "source": "sql", "pinned": True})
    assert answer.status_code == 201
    entry = answer.json()
    assert (entry["id"], entry["version"], entry["rank"], entry["pinned"]) == ("mine", 1, 4, True)
    assert world.get("/v1/adapters/mine").json()["digest"] == entry["digest"]
    assert world.ask("mine") == world.ask("sql")
    with world.client() as client:
        gone = client.delete("/v1/adapters/mine")
    assert gone.json() == {"id": "mine", "object": "adapter.unloaded", "status": "unloaded", "in_flight": 0}
    assert error_of(world.get("/v1/adapters/mine"))[2] == "model_not_found"


def test_replace_makes_a_version(world: World) -> None:
    before = world.ask("sql")
    save_adapter(world.adapters / "newer", seed=9)
    body = {"name": "sql", "source": "newer", "if_exists": "replace"}
    assert world.post("/v1/adapters", body).json()["version"] == 2
    after = world.ask("sql")
    assert after != before
    assert world.ask("sql@1") == before
    assert world.ask("sql@2") == after
    assert error_of(
        world.post("/v1/chat/completions", {"model": "sql@3", "messages": [{"role": "user", "content": "a"}]})
    )[:3] == (
        404,
        "not_found_error",
        "model_not_found",
    )


def test_pin_and_alias(world: World) -> None:
    world.ask("sql")
    assert world.post("/v1/adapters/sql/pin", {}).json()["pinned"] is True
    assert world.post("/v1/adapters/sql/pin", {"pinned": False}).json()["pinned"] is False
    alias = world.post("/v1/adapters/sql/alias", {"alias": "prod"})
    assert alias.status_code == 201
    assert alias.json()["alias_of"] == "sql@1"
    assert world.ask("prod") == world.ask("sql")
    assert error_of(world.post("/v1/adapters/sql/alias", {"alias": "../x"}))[2] == "invalid_adapter_id"
    assert error_of(world.post("/v1/adapters/nope/pin", {}))[2] == "model_not_found"


def test_as_vllm_is_asked(world: World) -> None:
    loaded = world.post("/v1/load_lora_adapter", {"lora_name": "v", "lora_path": "style"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'v' added successfully.")
    absolute = {"lora_name": "w", "lora_path": str(world.adapters / "style")}
    assert world.post("/v1/load_lora_adapter", absolute).status_code == 200
    assert world.ask("v") == world.ask("style") == world.ask("w")
    again = world.post("/v1/load_lora_adapter", {"lora_name": "v", "lora_path": "sql"})
    assert error_of(again)[:3] == (409, "conflict_error", "adapter_exists")
    body = {"lora_name": "v", "lora_path": "sql", "load_inplace": True}
    assert world.post("/v1/load_lora_adapter", body).status_code == 200
    assert world.ask("v") == world.ask("sql")
    gone = world.post("/v1/unload_lora_adapter", {"lora_name": "v"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'v' removed successfully.")
    assert error_of(world.post("/v1/unload_lora_adapter", {"lora_name": "v"}))[0] == 404


def test_mistakes(world: World) -> None:
    assert error_of(world.post("/v1/adapters", {"name": BASE, "source": "sql"}))[:3] == (
        409,
        "conflict_error",
        "adapter_exists",
    )
    assert error_of(world.post("/v1/adapters", {"name": "x", "sauce": "sql"})) == (
        400,
        "invalid_request_error",
        "invalid_request",
        "sauce",
    )
    with world.client() as client:
        assert error_of(client.delete("/v1/adapters/sql?forse=1"))[3] == "forse"
        assert error_of(client.delete("/v1/adapters/sql?force=perhaps"))[3] == "force"


def test_an_adapter_with_a_template_of_its_own(world: World) -> None:
    from lorakit.models.chat_template import save_template
    from tests.tiny_chat import tiny_tokenizer

    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    plain = world.ask("sql")
    tokens = world.post("/v1/chat/completions", _hello("sql")).json()["usage"]["prompt_tokens"]
    save_template(world.adapters / "sql", tiny_tokenizer(template))
    assert world.ask("sql") == plain  # it was loaded without
    world.post("/v1/adapters", {"name": "own", "source": "sql"})
    save_adapter(world.adapters / "other", seed=8)
    save_template(world.adapters / "other", tiny_tokenizer(template))
    counted = world.post("/v1/chat/completions", _hello("other")).json()["usage"]["prompt_tokens"]
    assert counted == len(tiny_tokenizer()("[user] hello<|endoftext|>[assistant] ")["input_ids"]) != tokens
    save_adapter(world.adapters / "bad", seed=7)
    save_template(world.adapters / "bad", tiny_tokenizer(template))
    (world.adapters / "bad" / "chat_template.jinja").write_text("{{ 'changed' }}")
    assert error_of(world.post("/v1/adapters", {"name": "bad"}))[:3] == (
        400,
        "invalid_request_error",
        "adapter_corrupt",
    )


def _hello(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_another_template_makes_another_version(world: World) -> None:
    from lorakit.models.chat_template import save_template
    from tests.tiny_chat import TEMPLATE, tiny_tokenizer

    def digest(template: str) -> str:
        save_template(world.adapters / "sql", tiny_tokenizer(template))
        body = {"name": "mine", "source": "sql", "if_exists": "replace"}
        entry = world.post("/v1/adapters", body).json()
        versions.append(entry["version"])
        return str(entry["digest"])

    versions: list[int] = []
    save_adapter(world.adapters / "bare", seed=1)  # the same tensors, and no word of a template
    plain = world.post("/v1/adapters", {"name": "bare"}).json()["digest"]
    loud = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    found = [digest(TEMPLATE), digest(loud), digest(loud), digest(TEMPLATE)]
    assert versions == [1, 2, 2, 3]
    assert found[1] == found[2]
    assert found[0] == found[3]
    assert len({plain, *found}) == 3
    assert world.ask("mine@2", "hello") == world.ask("mine@1", "HELLO")
    assert world.ask("mine@1", "hello") == world.ask("bare", "hello") != world.ask("mine@2", "hello")


def test_a_template_in_the_one_folder_inside(world: World) -> None:
    from lorakit.models.chat_template import save_template
    from tests.tiny_chat import TEMPLATE, tiny_tokenizer

    loud = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    save_adapter(world.adapters / "run" / "adapter", seed=1)
    save_template(world.adapters / "run" / "adapter", tiny_tokenizer(loud))
    assert world.post("/v1/adapters", {"name": "run"}).status_code == 201
    assert world.ask("run", "hello") == world.ask("sql", "HELLO")


def test_the_source_is_a_path_in_the_adapter_folder(world: World, tmp_path: Path) -> None:
    def source(name: str) -> str | None:
        (entry,) = [e for e in world.get("/v1/adapters").json()["data"] if e["id"] == name]
        assert world.get(f"/v1/adapters/{name}").json()["source"] == entry["source"]
        return str(entry["source"])

    assert source("sql") == "sql"
    loaded = world.post("/v1/adapters", {"name": "mine", "source": "./style"})
    assert loaded.json()["source"] == source("mine") == "style"
    world.post("/v1/adapters/mine/alias", json := {"alias": "prod"})
    assert source(json["alias"]) == "style"
    elsewhere = save_adapter(tmp_path / "elsewhere", seed=5)
    world.server.store.load("far", elsewhere, anywhere=True).result(20)
    assert source("far") == str(elsewhere)
