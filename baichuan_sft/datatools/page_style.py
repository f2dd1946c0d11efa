"""How the page of ``data check`` looks, and the Chinese beside its English labels."""

CHINESE = {
    "Data report": "数据报告",
    "What became of the data": "数据去向",
    "Overview": "概览",
    "Length": "长度",
    "Language": "语言",
    "Findings": "检查结果",
    "Errors": "错误",
    "Files": "文件",
    "First conversations": "前几条对话",
    "no errors": "没有错误",
    "errors": "个错误",
    "used": "使用",
    "rejected": "拒绝",
    "duplicates dropped": "重复已去除",
    "without a target": "无训练目标",
    "too long": "过长",
    "not drawn": "未抽取",
    "lost to length": "超长截去",
    "not used": "未使用",
    "conversations": "对话数",
    "turns each": "平均轮数",
    "supervised": "参与训练",
    "cut": "被截断",
    "no target left": "无训练目标",
    "copies": "重复",
    "keys not read": "未识别的键",
    "letters in one of 200 records": "每 200 条抽 1 条统计字母",
    "characters": "字符",
    "tokens": "词元",
    "tokens trained": "词元参与训练",
    "severity": "级别",
    "code": "代码",
    "number": "数量",
    "meaning": "含义",
    "first": "最早出现",
    "place": "位置",
    "text": "说明",
    "file": "文件",
    "records": "记录",
    "good": "可用",
    "turns": "轮数",
    "formats": "格式",
    "roles": "角色",
    "zh": "中文",
    "en": "英文",
    "ja": "日文假名",
    "ko": "韩文",
    "ru": "西里尔字母",
}

# what a bar is made of -> number of its colour below
COLOUR = {
    **{
        "used": 0,
        "rejected": 1,
        "duplicates dropped": 2,
        "without a target": 3,
        "too long": 4,
        "not drawn": 5,
    },
    **{"lost to length": 2, "not used": 5},
    **{"zh": 0, "en": 3, "ja": 2, "ko": 4, "ru": 5},
}

STYLE = """
:root { --ink: #1c2430; --dim: #667085; --paper: #fff; --panel: #f6f8fa; --line: #d8dee6;
  --red: #c62828; --green: #177245; --mark: #c9f2d6;
  --p0: #3574c4; --p1: #c62828; --p2: #e0a100; --p3: #7a5bb5; --p4: #8a6d3b; --p5: #8a97a8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #98a2b3; --paper: #14181e;
  --panel: #1d232b; --line: #343c47; --red: #ff7b72; --green: #56d391; --mark: #1d4d30; --p0: #5b9bea } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: .85rem; margin: 0 0 .3rem; color: var(--dim); font-weight: 600 }
p { margin: .4rem 0 }
small, dt, th { color: var(--dim) }
.good { color: var(--green); font-weight: 600 }
.bad, .bad a, .ERROR { color: var(--red) }
.WARN { color: var(--p2) }
.NOTE { color: var(--dim) }
.stack { display: flex; height: 1.4rem; border-radius: 4px; overflow: hidden; margin: .4rem 0 }
.stack span { min-width: 3px; flex-basis: 0 }
ul { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: 0 0 1rem; padding: 0; list-style: none }
li::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: 2px; background: var(--p) }
.stack span { background: var(--p) }
.p0 { --p: var(--p0) } .p1 { --p: var(--p1) } .p2 { --p: var(--p2) }
.p3 { --p: var(--p3) } .p4 { --p: var(--p4) } .p5 { --p: var(--p5) }
dl.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .6rem }
dl { margin: 0 }
.cards div { background: var(--panel); border-radius: 6px; padding: .5rem .7rem }
.cards dt { font-size: .8rem }
dd { margin: 0 }
.wide { overflow-x: auto }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; font-size: .88rem }
.bars dt { text-align: right }
.bars i { display: inline-block; min-width: 2px; height: .95em; margin-right: .5em; vertical-align: -.1em;
  border-radius: 0 3px 3px 0; background: var(--p0) }
.cut { color: var(--red) }
dd.cut { border-top: 2px dashed var(--red) }
table { border-collapse: collapse; width: 100%; min-width: 44rem; font-size: .88rem;
  overflow-wrap: break-word }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0;
  border-bottom: 1px solid var(--line); min-width: 3.5rem }
th { font-weight: 600; white-space: nowrap }
code { white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
article { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0 }
.trained { background: var(--mark); border-radius: 2px }
.seen { color: var(--dim) }
.marker { color: var(--p0); font-size: .8em }
"""
