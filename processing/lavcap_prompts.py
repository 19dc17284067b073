"""
Prompts of LAVCap (arXiv:2501.09291, table V) as chat templates, and requests for training.

A prompt encloses the audio and visual tokens in tags: `USER: <Audio>[tokens]</Audio> Please describe the audio.`, then
`ASSISTANT:` on a line of its own. The tags are plain text.
"""

from dataclasses import dataclass, replace


# fusions whose tokens are of both modalities, which prompt III cannot separate
JOINT_FUSIONS = ("joint_encoder", "q_former")

# requests for prompt I, of which training draws one per sample
TRAINING_REQUESTS = (
    "Describe the sounds in this clip.",
    "What can be heard in this recording?",
    "Write one sentence about the sounds.",
    "Which sounds occur, and in what order?",
    "Give a caption for this audio.",
    "Summarize the sound events of the clip.",
    "Tell me what happens in this recording.",
    "Put the audio into words.",
)


@dataclass(frozen=True)
class LavcapPrompt:
    """
    A prompt of LAVCap.

    Attributes:
        chat_template: Jinja template for `LlavaAudioProcessor(chat_template=...)`.
        request: text of the user turn, the `question` of `LlavaAudioProcessor.format_prompt`.
    """

    chat_template: str
    request: str


def _placeholders(kind: str) -> str:
    return f"{{% for block in content if block['type'] == '{kind}' %}}{{{{ '<{kind}>' }}}}{{% endfor %}}"


def _tagged(tag: str, *kinds: str) -> str:
    """Return the part of a template that writes placeholders of `kinds` in a tag, or nothing if there are none."""
    inner = f"{{{{ '<{tag}>' }}}}" + "".join(map(_placeholders, kinds)) + f"{{{{ '</{tag}>' }}}}"
    return f"{{% if content | selectattr('type', 'in', {list(kinds)}) | list %}}{inner}{{% endif %}}"


def lavcap_chat_template(tag: str = "Audio", visual_tag: str | None = None) -> str:
    """
    Return the chat template of a prompt. Audio placeholders precede image placeholders.

    Args:
        tag: name of the tag around the tokens. The authors' program has `"Speech"` in place of the paper's `"Audio"`.
        visual_tag: name of a tag for the visual tokens alone; by default, one tag encloses all tokens.
    """
    if visual_tag is None:
        media = _tagged(tag, "audio", "image")
    else:
        media = _tagged(tag, "audio") + _tagged(visual_tag, "image")
    return (
        "{% for message in messages %}"
        "{% if message['content'] is string %}"
        "{% set content = [{'type': 'text', 'text': message['content']}] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
        "{% if message['role'] == 'system' %}{{ text + ' ' }}"
        "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
        + media
        + _placeholders("prefix")
        + "{% if content | rejectattr('type', 'equalto', 'text') | list %}{{ ' ' }}{% endif %}"
        "{{ text + '\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
        "{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('unknown role ' + message['role']) }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


LAVCAP_PROMPTS = {
    "I": LavcapPrompt(lavcap_chat_template("Audio"), "Please describe the audio."),
    "II": LavcapPrompt(lavcap_chat_template("Content"), "Please describe the content."),
    "III": LavcapPrompt(lavcap_chat_template("Audio", "Visual"), "Please describe the audio and visual elements."),
}


def lavcap_prompt(name: str, fusion: str = "concatenate", audio_tag: str = "Audio") -> LavcapPrompt:
    """
    Return prompt `"I"`, `"II"` or `"III"` for a model with `config.fusion`, with `audio_tag` in place of `Audio`.

    Prompt III has the visual tokens in a tag of their own, so it excludes the fusions of `JOINT_FUSIONS`.

    Raises:
        ValueError: the prompt is unknown, or the fusion leaves no audio and visual tokens to separate.

    Example:
        >>> lavcap_prompt("II", fusion="q_former").request
        'Please describe the content.'
    """
    if name not in LAVCAP_PROMPTS:
        raise ValueError(f"prompt {name!r} is unknown; choose {', '.join(LAVCAP_PROMPTS)}")
    if name == "III" and fusion in JOINT_FUSIONS:
        raise ValueError(
            f"prompt III separates audio and visual tokens, but fusion={fusion!r} joins them; choose prompt I or II, "
            "or another fusion, such as ot_attention"
        )
    prompt = LAVCAP_PROMPTS[name]
    return replace(prompt, chat_template=prompt.chat_template.replace("Audio>", f"{audio_tag}>"))
