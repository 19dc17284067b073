"""Chat templates: that of LLaVA-1.5, and that of a language model with the media at the start of a turn."""

from transformers.utils.chat_template_utils import render_jinja_template


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# The turns in order, without a system sentence. A turn starts with its media: image, audio, prefix.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set content = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% if message['role'] == 'system' %}{{ text + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% set media = namespace(any=false) %}"
    "{% for kind in ['image', 'audio', 'prefix'] %}"
    "{% for block in content if block['type'] == kind %}"
    "{{ '<' + kind + '>' }}{% set media.any = true %}"
    "{% endfor %}{% endfor %}"
    "{% if media.any %}{{ '\\n' }}{% endif %}"
    "{{ text + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# The conversation format of LLaVA-1.5 (Vicuna v1.1). A system message replaces the default system sentence.
DALI_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ \"" + VICUNA_SYSTEM + ' " }}{% endif %}' + PLAIN_CHAT_TEMPLATE
)

# Replaces the blocks of each message by one string, which templates of language models take: placeholders of the
# media, a line break, and the text. The environment of transformers removes the line break after the last tag.
BLOCKS_TO_TEXT = (
    "{% set plain = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is iterable and message['content'] is not string %}"
    "{% set turn = namespace(media='') %}"
    "{% for kind in ['image', 'audio', 'prefix'] %}"
    "{% for block in message['content'] if block['type'] == kind %}"
    "{% set turn.media = turn.media + '<' + kind + '>' %}"
    "{% endfor %}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% set text = turn.media + '\\n' + text if turn.media else text %}"
    "{% set plain.messages = plain.messages + [dict(message, content=text)] %}"
    "{% else %}{% set plain.messages = plain.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = plain.messages %}\n"
)


def with_media(template: str, **special_tokens: str) -> str:
    """
    Adapt the chat template of a language model to content blocks, with media at the start of their turn.

    Args:
        template: Jinja template that takes strings.
        special_tokens: special tokens of the tokenizer, such as `eos_token`.

    Raises:
        ValueError: the template does not write the text of a user turn, or fails on it.
    """
    if template.startswith(BLOCKS_TO_TEXT):
        return template
    adapted, text = BLOCKS_TO_TEXT + template, "What can be heard?"
    conversation = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]
    reason = "it does not write the placeholders and the text of a user turn"
    try:
        (rendered,), _ = render_jinja_template([conversation], chat_template=adapted, **special_tokens)
    except Exception as error:  # templates raise what they like
        rendered, reason = "", " ".join(str(error).split())
    if f"<audio>\n{text}" not in rendered:
        raise ValueError(f"the tokenizer's chat template cannot be used ({reason}); pass chat_template=...")
    return adapted


__all__ = ["DALI_CHAT_TEMPLATE", "PLAIN_CHAT_TEMPLATE", "with_media"]
