"""Rows of kinds that people feed by mistake, written by hand after the demonstration sets of other tools."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]

PLACES = ["北京", "苏州", "Leeds", "Aarhus"]

ALPACA: Rows = [
    {
        "instruction": f"介绍一下{place}的早市",
        "input": "",
        "output": f"{place}的早市六点开门，先去买豆浆。",
        "system": "",
    }
    for place in PLACES
]
ALPACA_WITH_HISTORY: Rows = [
    {**row, "history": [["早上好", "早上好，想去哪里？"], ["想去吃早饭", "几个人去？"]]} for row in ALPACA
]
IDENTITY: Rows = [
    {"instruction": "hi", "input": "", "output": "Hello! I am {{name}}, an assistant made by {{author}}."},
    {"instruction": "你是谁？", "input": "", "output": "我是 {{ name }}，由 {{author}} 开发。"},
    {"instruction": "What is your name?", "input": "", "output": "My name is ${name}."},
]
SHAREGPT_TOOLS: Rows = [
    {
        "conversations": [
            {"from": "human", "value": f"{place} 换成欧元是多少？"},
            {"from": "function_call", "value": '{"name": "convert", "arguments": {"amount": 5}}'},
            {"from": "observation", "value": '{"amount": 4.6}'},
            {"from": "gpt", "value": "是 4.6 欧元。"},
        ],
        "tools": '[{"name": "convert", "description": "convert an amount"}]',
    }
    for place in PLACES
]
# The other half of such a set: the tools are named, the answer speaks of them, and no call is made.
SHAREGPT_TOOLS_UNCALLED: Rows = [
    {
        "conversations": [
            {"from": "human", "value": f"帮我订 {place} 的酒店"},
            {"from": "gpt", "value": "我只能换算货币，不能订酒店。"},
        ],
        "tools": '[{"name": "convert", "description": "convert an amount"}]',
    }
    for place in PLACES
]
SHAREGPT_NO_TOOLS: Rows = [{**row, "tools": "[]"} for row in SHAREGPT_TOOLS_UNCALLED]
OPENAI_TOOLS: Rows = [
    {
        "messages": [
            {"role": "user", "content": f"Weather in {place}?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "9 degrees"},
            {"role": "assistant", "content": "It is 9 degrees."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "parallel_tool_calls": False,
    }
    for place in PLACES
]
DPO_ALPACA: Rows = [
    {"instruction": f"{place}好玩吗", "input": "", "chosen": "好玩，先去河边。", "rejected": "不知道。"}
    for place in PLACES
]
DPO_SHAREGPT: Rows = [
    {
        "conversations": [{"from": "human", "value": f"{place}好玩吗"}],
        "chosen": {"from": "gpt", "value": "好玩，先去河边。"},
        "rejected": {"from": "gpt", "value": "不知道。"},
    }
    for place in PLACES
]
DPO_MESSAGES: Rows = [
    {
        "chosen": [{"role": "user", "content": place}, {"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "user", "content": place}, {"role": "assistant", "content": "No."}],
    }
    for place in PLACES
]
DPO_PROMPT: Rows = [{"prompt": place, "chosen": "Yes.", "rejected": "No."} for place in PLACES]
DPO_OPENAI: Rows = [
    {
        "input": {"messages": [{"role": "user", "content": place}]},
        "preferred_output": [{"role": "assistant", "content": "Yes."}],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    }
    for place in PLACES
]
KTO_MESSAGES: Rows = [
    {
        "messages": [
            {"role": "user", "content": f"Is {place} a city?"},
            {"role": "assistant", "content": "Yes." if number % 2 else "Who knows."},
        ],
        "label": bool(number % 2),
    }
    for number, place in enumerate(PLACES)
]
KTO_COMPLETION: Rows = [
    {"prompt": place, "completion": "Yes.", "label": bool(number % 2)} for number, place in enumerate(PLACES)
]
IMAGES_SHAREGPT: Rows = [
    {
        "messages": [
            {"role": "user", "content": "<image>Who are they?"},
            {"role": "assistant", "content": f"Two bakers in {place}."},
        ],
        "images": [f"pictures/{place}.jpg"],
    }
    for place in PLACES
]
IMAGES_OPENAI: Rows = [
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Who are they?"},
                    {"type": "image_url", "image_url": {"url": f"https://example.com/{place}.jpg"}},
                ],
            },
            {"role": "assistant", "content": "Two bakers."},
        ]
    }
    for place in PLACES
]
AUDIO: Rows = [{"instruction": "What is said?", "output": place, "audios": [f"{place}.wav"]} for place in PLACES]
VIDEO: Rows = [{"prompt": "What happens?", "completion": place, "video": f"{place}.mp4"} for place in PLACES]
WEIGHTS: Rows = [
    {
        "messages": [
            {"role": "user", "content": place},
            {"role": "assistant", "content": "wrong", "weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "right", "weight": 1},
        ]
    }
    for place in PLACES
]
NEUTRAL_WEIGHTS: Rows = [
    {"messages": [{"role": "user", "content": place}, {"role": "assistant", "content": "right", "weight": 1}]}
    for place in PLACES
]
NOT_TRAINED: Rows = [
    {"conversations": [{"from": "human", "value": place}, {"from": "gpt", "value": "wrong", "loss": False}]}
    for place in PLACES
]
REASONING: Rows = [
    {
        "messages": [
            {"role": "user", "content": place},
            {"role": "assistant", "content": "4", "reasoning_content": "2+2"},
        ]
    }
    for place in PLACES
]
CLASSIFICATION: Rows = [{"text": f"{place} was lovely.", "label": number} for number, place in enumerate(PLACES)]
TOPICS: Rows = [{**row, "label": "travel", "id": number} for number, row in enumerate(ALPACA)]
EMBEDDINGS: Rows = [{"query": place, "pos": ["a city"], "neg": ["a river"]} for place in PLACES]
PROMPTS: Rows = [{"prompt": f"2 + {number}", "ground_truth": str(2 + number)} for number in range(4)]
CONTEXT: Rows = [
    {"instruction": "When?", "context": f"{place} opens at nine.", "output": "At nine."} for place in PLACES
]
TOKENISED: Rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]}] * 4
TURN_A_ROW: Rows = [
    {"message_id": "a", "parent_id": None, "text": "早市几点开？", "role": "prompter"},
    {"message_id": "b", "parent_id": "a", "text": "六点。", "role": "assistant"},
] * 2
WRONG_ANSWERS: Rows = [{"prompt": "2 + 2?", "completion": "5", "is_correct": False}] * 4
ATTACHMENTS: Rows = [
    {
        "messages": [
            {"role": "user", "content": "Sum it up.", "attachments": ["report.pdf"]},
            {"role": "assistant", "content": "Sales rose."},
        ]
    }
] * 4
RATIONALE: Rows = [{"instruction": "2 + 2?", "output": "4", "rationale": "Two and two make four."}] * 4
