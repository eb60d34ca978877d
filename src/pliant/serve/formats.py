"""The fields of a request that say what its answer must look like, and the grammar they stand for.

response_format is OpenAI's; guided_regex and guided_choice are those of other servers.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from pliant.serve.api_error import ApiError
from pliant.serve.grammar import Grammar, GrammarError, Grammars


class JsonSchema(BaseModel):
    """`strict` is not looked at: answers always keep to the schema."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """type: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchema | None = None

    def schema_of(self) -> Any:
        """The JSON schema of the answer. Raises ApiError where there is none."""
        if self.type == "json_object":
            return {"type": "object"}
        if self.type != "json_schema":
            words = f"response_format {self.type!r} is none of text, json_object and json_schema"
            raise ApiError(words, param="response_format")
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ApiError("response_format.json_schema.schema is missing", param="response_format")
        return self.json_schema.schema_


class Format(BaseModel):
    """At most one of these can be given; a response_format of text counts as none."""

    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """What the answer must be, if anything. Raises ApiError for what cannot be followed."""
        form = self.response_format
        given = {
            "response_format": None if form is None or form.type == "text" else form,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
        }
        params = [param for param, value in given.items() if value is not None]
        if not params:
            return None
        if len(params) > 1:
            raise ApiError(f"give only one of {', '.join(params)}", param=params[1])
        try:
            if self.guided_regex is not None:
                return grammars.regex(self.guided_regex)
            if self.guided_choice is not None:
                return grammars.choice(self.guided_choice)
            return grammars.json(form.schema_of() if form else None)
        except GrammarError as error:
            words = f"{params[0]}: {error}"
            raise ApiError(words, param=params[0], code="invalid_grammar") from None
