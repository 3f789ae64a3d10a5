"""What `/openapi.json` says: the routes, their bodies and replies, in OpenAPI 3.1."""

from __future__ import annotations

from cartridges_jax.serving import messages, responses
from cartridges_jax.serving.fields import FLAG, IDS, TEXT, FieldTable, Schema
from cartridges_jax.serving.protocol import ROLES
from cartridges_jax.serving.store import SOURCES

NULL: Schema = {"type": "null"}


def document_of(model: str, table: FieldTable) -> Schema:
    """The API of a server of `model`."""
    errors = {"4XX": _reply("refused, and why", _ref("Error"))}
    chat, text = _ref("ChatCompletionRequest"), _ref("CompletionRequest")
    many = _object({"requests": {"type": "array", "items": chat, "minItems": 1}}, "requests")
    act = _post("", _ref("CartridgeReference"), "how the cartridge is then", _ref("Cartridge"))
    paths: Schema = {
        "/health": _get("Whether the engine runs.", _ref("Health"), "503"),
        "/ping": _get("Whether the server runs.", _object({"message": TEXT}, "message")),
        "/metrics": _get("Counters in Prometheus' format.", None),
        "/v1/models": _get("The model, and the model with each cartridge.", _list(_ref("Model"))),
        "/v1/models/{id}": _get(
            "The model, or the model with a cartridge.", _ref("Model"), parameter=f"{model} or {model}:CARTRIDGE"
        ),
        "/v1/chat/completions": _post(
            "Answers a conversation.", chat, "the answer", _ref("ChatCompletion"), streams=True
        ),
        "/v1/completions": _post("Continues texts.", text, "the continuations", _ref("Completion"), streams=True),
        "/v1/responses": _post(
            "Answers a conversation, as OpenAI's newer API.",
            _ref("ResponseRequest"),
            "the answer",
            _object({"id": TEXT, "output": {"type": "array"}}, "id", "output"),
            streams=True,
        ),
        "/v1/messages": _post(
            "Answers a conversation, as Anthropic's API.",
            _ref("MessagesRequest"),
            "the answer",
            _object({"id": TEXT, "content": {"type": "array"}}, "id", "content"),
            streams=True,
        ),
        "/v1/messages/count_tokens": _post(
            "How many tokens such a conversation has.",
            _ref("MessagesRequest"),
            "the count",
            _object({"input_tokens": {"type": "integer"}}, "input_tokens"),
        ),
        "/v1/cartridges": _get("Cartridges of the folder, and those that are loaded.", _list(_ref("Cartridge"))),
        "/v1/cartridges/{id}": _get("One of the folder.", _ref("Cartridge"), parameter="its name"),
        "/v1/cartridges/load": act | {"post": act["post"] | {"summary": "Loads a cartridge, or its newest version."}},
        "/v1/cartridges/unload": act | {"post": act["post"] | {"summary": "Drops a cartridge from memory."}},
        "/v1/cartridges/pin": act | {"post": act["post"] | {"summary": "Loads a cartridge and never drops it."}},
        "/v1/cartridges/unpin": act | {"post": act["post"] | {"summary": "Lets a pinned cartridge be dropped."}},
        "/tokenize": _post("Token ids of a text or conversation.", _ref("TokenizeRequest"), "ids", _object({})),
        "/tokenizer_info": _get("The tokenizer's special tokens and chat template.", _object({})),
        "/detokenize": _post(
            "The text of token ids.", _object({"tokens": IDS}, "tokens"), "text", _object({"prompt": TEXT})
        ),
        "/custom/synchronous-batch-completions": _post(
            "Answers several conversations; as npz where Accept is application/x-npz.",
            many,
            "their answers in order",
            {"type": "array", "items": _ref("ChatCompletion")},
        ),
    }
    summary, batches = "As Tokasaurus serves it.", paths["/custom/synchronous-batch-completions"]
    for start in ("/custom/cartridge", "/v1/cartridge", "/batch/cartridge"):
        answers = _post(summary, chat, "the answer", _ref("ChatCompletion"), streams=True)
        paths[f"{start}/completions"] = _post(summary, text, "the continuations", _ref("Completion"), streams=True)
        paths[f"{start}/synchronous-batch-completions"] = batches
        paths[f"{start}/chat/completions"] = batches if start == "/batch/cartridge" else answers
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"] |= errors
    return {
        "openapi": "3.1.0",
        "info": {"title": "cartridges_jax", "version": "1", "description": __doc__},
        "paths": paths,
        "components": {
            "schemas": _schemas(table),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas(table: FieldTable) -> Schema:
    count = {"type": "integer", "minimum": 0}
    details = _object({"cached_tokens": count, "cartridge_tokens": count})
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), count)
    usage = _object(counts | {"prompt_tokens_details": details})
    envelope = {"id": TEXT, "object": TEXT, "created": count, "model": TEXT, "usage": usage}
    ending = {"index": count, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}}
    message = _object({"role": TEXT, "content": {"anyOf": [TEXT, NULL]}})
    answers = [ending | {"message": message}, ending | {"text": TEXT}]
    choices = [{"choices": {"type": "array", "items": _object(answer, "index")}} for answer in answers]
    error = {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    return {
        "Message": _object(
            {
                "role": {"enum": list(ROLES)},
                "content": {"anyOf": [TEXT, {"type": "array", "items": _object({"type": TEXT, "text": TEXT})}, NULL]},
                "tool_calls": {"type": "array", "items": {"type": "object"}},
                "tool_call_id": TEXT,
            },
            "role",
        ),
        "CartridgeReference": _object({"id": TEXT, "source": {"enum": list(SOURCES)}, "force_redownload": FLAG}, "id"),
        "ChatCompletionRequest": _object(table.schema("chat"), "messages"),
        "CompletionRequest": _object(table.schema("text"), "prompt"),
        "ResponseRequest": _object(responses.TABLE.schema("responses"), "input"),
        "MessagesRequest": _object(messages.TABLE.schema("messages"), "messages"),
        "TokenizeRequest": _object(table.schema("tokenize")),
        "ChatCompletion": _object(envelope | choices[0], "id", "choices", "usage"),
        "Completion": _object(envelope | choices[1], "id", "choices", "usage"),
        "Health": _object(
            {
                "status": {"enum": ["ok", "starting", "failed"]},
                "programs": count,
                "compiled": count,
                "seconds_left": {"type": ["number", "null"]},
            },
            "status",
        ),
        "Model": _object({"id": TEXT, "object": TEXT, "created": count, "max_model_len": count}, "id", "object"),
        "Cartridge": _object(
            {
                "id": TEXT,
                "source": {"enum": list(SOURCES)},
                "loaded": FLAG,
                "pinned": FLAG,
                "in_use": count,
                "version": {"type": ["string", "null"]},
                "slots": count,
            },
            *("id", "source", "loaded", "pinned"),
        ),
        "Error": _object({"error": _object(error, *error)}, "error"),
    }


def _get(summary: str, schema: Schema | None, *others: str, parameter: str | None = None) -> Schema:
    told = _reply(summary, schema) if schema else {"description": summary, "content": {"text/plain": {}}}
    operation: Schema = {"summary": summary, "responses": {"200": told}}
    operation["responses"] |= {status: _reply("it is starting, or has failed", schema) for status in others}
    if parameter is not None:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": TEXT, "description": parameter}
        ]
    return {"get": operation}


def _post(summary: str, body: Schema, told: str, reply: Schema, streams: bool = False) -> Schema:
    answer = _reply(told, reply)
    if streams:
        answer["content"]["text/event-stream"] = {"schema": TEXT}
    request = {"required": True, "content": {"application/json": {"schema": body}}}
    return {"post": {"summary": summary, "requestBody": request, "responses": {"200": answer}}}


def _reply(description: str, schema: Schema | None) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _list(schema: Schema) -> Schema:
    return _object({"object": TEXT, "data": {"type": "array", "items": schema}}, "data")


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
