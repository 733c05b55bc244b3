// The prompt that llama.cpp builds for each request: JSON lines {"source", "messages", "tools"} in, {"prompt"} or
// {"refused"} out. Built from llama.cpp's own files by test_llama_cpp.py; no model is loaded.
#include "chat.h"
#include "json.h"
#include <iostream>
#include <string>

int main() {
    std::string line, last;
    common_chat_templates_ptr templates;
    while (std::getline(std::cin, line)) {
        common_json out = common_json::object();
        try {
            auto asked = common_json::parse(line);
            std::string source = asked.at("source");
            if (source != last) {
                templates = common_chat_templates_init(nullptr, source);
                last = source;
            }
            common_chat_templates_inputs inputs;
            inputs.messages = common_chat_msgs_parse_oaicompat(asked.at("messages"));
            if (!asked.at("tools").is_null()) inputs.tools = common_chat_tools_parse_oaicompat(asked.at("tools"));
            out["prompt"] = common_chat_templates_apply(templates.get(), inputs).prompt;
        } catch (const std::exception & error) {
            out["refused"] = std::string(error.what());
        }
        std::cout << out.dump() << std::endl;
    }
}
