"""What the published request classes of vLLM and SGLang make of requests: python server_classes.py NAME FOLDER <
requests > answers

FOLDER holds the unpacked wheel (and `openai_harmony`, `partial_json_parser`, `pybase64`), which was not installed: only
the modules named here are imported as they are. What they import besides (kernels, engines, other servers) is a
stand-in that does nothing, since nothing of it is called. Each line in and out is JSON."""
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

REAL = {
    "vllm": ["envs", "exceptions", "entrypoints.openai.chat_completion.protocol", "entrypoints.generate.base.protocol",
             "entrypoints.serve.engine.protocol", "renderers.chat_utils", "renderers.chat_utils.chat_message",
             "renderers.chat_utils.content_parser", "renderers.chat_utils.item_tracker", "renderers.chat_utils.types",
             "renderers.hf", "tool_parsers.abstract_tool_parser", "tool_parsers.hermes_tool_parser"],
    "sglang": ["srt.entrypoints.openai.protocol", "srt.entrypoints.openai.serving_chat",
               "srt.parser.jinja_template_utils",
               "srt.function_call.base_format_detector", "srt.function_call.core_types",
               "srt.function_call.qwen25_detector",
               "srt.function_call.utils"],
}


def any_schema(cls, source=None, handler=None): # what pydantic asks of a type
    from pydantic_core import core_schema
    return core_schema.any_schema()


class StandInType(type):
    def __getattr__(cls, name):
        if name.startswith("__"): raise AttributeError(name)
        return cls

    def __or__(cls, other): return other
    def __ror__(cls, other): return other
    def __getitem__(cls, item): return cls


def stand_in(name):
    def attribute(self, key):
        if key.startswith("__"): raise AttributeError(key)
        return lambda *args, **kw: args[0] if args and callable(args[0]) else None
    def call(self, *args, **kw): return args[0] if len(args) == 1 and callable(args[0]) else self
    return StandInType(
        name,
        (),
        {
            "__get_pydantic_core_schema__": classmethod(any_schema),
            "__init__": lambda *a, **k: None,
            "__call__": call,
            "__getattr__": attribute,
        },
    )


class StandInModule(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        setattr(self, name, stand_in(name))
        return self.__dict__[name]


class Wheel(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Finds the modules of a package that are in `REAL`; every other module of it is a stand-in."
    def __init__(self, package, folder):
        self.package, self.folder = package, Path(folder)
        self.real = {f"{package}.{name}" for name in REAL[package]}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in (self.package, "xgrammar"): return None
        if name not in self.real: return importlib.machinery.ModuleSpec(name, self, is_package=True)
        base = self.folder / name.replace(".", "/")
        if base.with_suffix(".py").exists(): return importlib.util.spec_from_file_location(name,
                base.with_suffix(".py"))
        return importlib.util.spec_from_file_location(name, base / "__init__.py",
                                                      submodule_search_locations=[str(base)])

    def create_module(self, spec): return StandInModule(spec.name)
    def exec_module(self, module): pass


def vllm():
    "A request, and an answer, through vLLM's classes."
    protocol = importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol")
    utils, hf = (importlib.import_module(f"vllm.renderers.{name}") for name in ("chat_utils", "hf"))
    parser = importlib.import_module("vllm.tool_parsers.hermes_tool_parser").Hermes2ProToolParser
    class Model: multimodal_config, enable_prompt_embeds = None, False
    def view(messages, tools, source):
        request = protocol.ChatCompletionRequest(model="m", messages=messages,
                                                 **({} if tools is None else {"tools": tools}))
        out, _, _ = utils.parse_chat_messages(request.messages, Model(),
                                              hf._detect_content_format(source, default="string"))
        if any(m["role"] == "developer" for m in out) and not hf._detect_developer_role_support(source):
            out = hf._consolidate_system_messages(hf._convert_developer_to_system(out))
        return out, None if request.tools is None else [tool.model_dump() for tool in request.tools]
    def read(text, tools):
        found = parser.extract_tool_calls(parser.__new__(parser), text, None)
        return found.content, [[call.function.name, call.function.arguments] for call in found.tool_calls]
    return view, read


def sglang():
    "A request, and an answer, through SGLang's classes."
    protocol = importlib.import_module("sglang.srt.entrypoints.openai.protocol")
    chat = importlib.import_module("sglang.srt.entrypoints.openai.serving_chat")
    template = importlib.import_module("sglang.srt.parser.jinja_template_utils")
    detector = importlib.import_module("sglang.srt.function_call.qwen25_detector")
    base = importlib.import_module("sglang.srt.function_call.base_format_detector")
    # its default
    base.envs = types.SimpleNamespace(SGLANG_FORWARD_UNKNOWN_TOOLS=types.SimpleNamespace(get=lambda: False))
    def view(messages, tools, source):
        request = protocol.ChatCompletionRequest(model="m", messages=messages,
                                                 **({} if tools is None else {"tools": tools}))
        if not request.messages: raise ValueError("Messages cannot be empty.")
        for tool in request.tools or []: # as `_validate_request` does
            if tool.function.parameters is None: continue
            chat.normalize_json_schema_types(tool.function.parameters)
            chat.Draft202012Validator.check_schema(tool.function.parameters)
        out, form = [], template.detect_jinja_template_content_format(source)
        for message in (m.model_dump() for m in request.messages): # as `_apply_jinja_template` does
            chat.normalize_assistant_tool_call_arguments(message)
            if message.get("content") is None: message["content"] = ""
            done = template.process_content_for_template_format(message, form, [], [], [], [])
            out.append({**done, "content": chat.normalize_tool_content(done["role"], done.get("content"))})
        return out, [tool.model_dump() for tool in request.tools or []] or None
    def read(text, tools):
        tools = [protocol.Tool(**tool) for tool in tools]
        found = detector.Qwen25Detector().detect_and_parse(text, tools)
        return found.normal_text, [[call.name, call.parameters] for call in found.calls]
    return view, read


def plain(message): # what a template may read
    calls = [
        {"function": {key: call["function"].get(key) for key in ("name", "arguments")}}
        for call in message.get("tool_calls") or []
    ]
    return {"role": message["role"], "content": message.get("content"), "tool_calls": calls}


def main(name, folder):
    sys.path.insert(0, str(Path(folder)))
    sys.meta_path.insert(0, Wheel(name, folder))
    view, read = {"vllm": vllm, "sglang": sglang}[name]()
    logging.disable()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "text" in asked: out = read(asked["text"], asked["tools"])
            else:
                messages, tools = view(asked["messages"], asked["tools"], asked["source"])
                out = [plain(message) for message in messages], tools
        except Exception as error: out = {"refused": type(error).__name__}
        print(json.dumps(out), flush=True)


if __name__ == "__main__": main(*sys.argv[1:])
