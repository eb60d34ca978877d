"""A tokenizer of bytes, with just what generation asks of one."""

from __future__ import annotations


class ByteTokenizer:
    """Token 4 + b is byte b; 0 pad, 1 bos, 2 end of text, 3 starts a turn."""

    eos_token_id = 2
    unk_token_id = None
    chat_template: str | None = None

    def tokens(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode("utf-8", "surrogatepass")]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        parts = text.split("<turn>")
        found = self.tokens(parts[0])
        for part in parts[1:]:
            found += [3, *self.tokens(part)]
        return {"input_ids": found}

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) -> str:
        return bytes(t - 4 for t in tokens if t >= 4).decode("utf-8", "replace")

    def convert_tokens_to_ids(self, text: str):
        return None

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True) -> str:
        said = "".join(f"<turn>{m['role'][0]}:{m['content']}" for m in messages)
        return said + "<turn>a:"


class ChatTokenizer(ByteTokenizer):
    chat_template = "turns"
