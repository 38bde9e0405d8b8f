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
