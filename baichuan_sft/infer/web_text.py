"""What the page says, in English and Chinese, side by side so that neither misses a line."""

LANGUAGES = {"en": "English", "zh": "中文"}

# name -> (English, Chinese)
TEXTS: dict[str, tuple[str, str]] = {
    "ask": ("Write a message", "输入消息"),
    "empty": (
        "What is said here stays on this machine. Write a message below to begin.",
        "对话只保存在本机。在下方输入消息即可开始。",
    ),
    "stop": ("Stop", "停止"),
    "retry": ("Answer again", "重新回答"),
    "clear": ("New conversation", "新对话"),
    "waiting": ("Another tab is being answered; this one is next.", "另一个标签页正在生成，请稍候。"),
    "thinking": ("…", "…"),
    "speed": ("{tokens} tokens · {rate:.1f} tokens/s", "{tokens} 个词元 · 每秒 {rate:.1f} 个"),
    "stopped": ("stopped", "已停止"),
    "failed": ("No answer: {what}", "无法回答：{what}"),
    "cut": (
        "The conversation has {whole} tokens; the model saw the last {room} or fewer.",
        "对话共 {whole} 个词元，超出上下文，模型只看到最后不超过 {room} 个。",
    ),
    "compare": ("Compare with {name}", "与 {name} 对比"),
    "bare": ("{name} (no adapter)", "{name}（无适配器）"),
    "system": ("System message", "系统消息"),
    "system_hint": (
        "Stands before the conversation; empty for none.",
        "放在对话最前面；留空则没有。",
    ),
    "answers": ("Answers", "回答设置"),
    "markdown": ("Show as Markdown", "以 Markdown 显示"),
    "max_new_tokens": ("Longest answer, tokens", "回答最多词元数"),
    "sample": ("Sample", "随机采样"),
    "sample_hint": ("Off: always the most likely token.", "关闭：总是取最可能的词元。"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top p", "Top p"),
    "top_k": ("Top k (0: all)", "Top k（0 为不限）"),
    "repetition_penalty": ("Repetition penalty (1: none)", "重复惩罚（1 为无）"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": (
        "Makes sampling repeatable; empty: another answer each time.",
        "固定后可复现；留空则每次不同。",
    ),
    "file": ("Conversation", "对话文件"),
    "file_hint": (
        "Belle JSON, which training reads: keep the good ones.",
        "Belle JSON，可直接用于训练：请留下好的对话。",
    ),
    "save": ("Save", "保存"),
    "save_of": ("Save that of {name}", "保存 {name} 的对话"),
    "load": ("Load a conversation", "载入对话"),
    "item": ("Which one in the file", "文件中的第几个"),
    "bad_file": ("Not loaded. {what}", "未载入。{what}"),
}


def words(language: str) -> dict[str, str]:
    """The texts of one of ``LANGUAGES``."""
    index = list(LANGUAGES).index(language)
    return {name: both[index] for name, both in TEXTS.items()}
