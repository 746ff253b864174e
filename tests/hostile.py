"""Templates that were written to do harm, and a child that renders them with little memory.

`python -m tests.hostile FOLDER [slow]` prints a line of JSON for each attack: [attack, kind of
template, what it came to, seconds]. FOLDER holds a tokenizer; none of the attacks may leave a file
`ran` there. `slow` are those that end as another one does.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

MOST_BYTES = 4 << 30  # of address space; a limit of the child's, not of coppice
MOST_SECONDS, GRACE_S = 0.25, 0.3  # instead of the 10 s of a job, and of 1 s
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "item": "{{ ''['__class__'] }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.popen('touch ran') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "generator frame": "{{ (messages or [1]) | map('upper') | attr('gi_frame') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "format by a variable": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format by map": "{{ ['{0.__class__}'] | map('format', cycler) | list }}{{ x.y.z }}",
    "environment": "{{ self._TemplateReference__context.environment.loader }}",
    "joined name": "{{ ''[['__cl', 'ass__'] | join] }}",
    "string with escapes": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "namespace": "{% set ns = namespace(__html__=1) %}{{ ns.__html__() }}",
    "namespace item": "{% set ns = namespace() %}{% set ns.__call__ = 1 %}{{ ns() }}",
    "mutation": "{{ messages.append(1) }}{{ text.append(1) }}",
    "import": "{% import 'os' as os %}{{ os.system('touch ran') }}",
    "include": "{% include '/etc/passwd' %}",
    "undefined call": "{{ open('ran', 'w') }}",
}
EXHAUSTION = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "macros that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "string": "{{ 'a' * 10**10 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "string in steps": "{{ 'a' * 9999999 * 999 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    "power": "{{ (10 ** (10 ** 8)) > 1 }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center method": "{{ 'a'.center(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "printf width": "{{ '%10000000000d' % 1 }}",
    "printf width given": "{{ '%*d' % (10**10, 1) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep conditions": "{% if true %}" * 500 + "{% endif %}" * 500,
    "long sum": "{{ 1" + " + 1" * 20000 + " }}",
    "long integer": "{{ 10 ** 10000 }}",
    "replace": "{{ ('a' * 9999999) | replace('a', 'b' * 9999) }}",
    "replace method": "{{ ('a' * 9999999).replace('a', 'b' * 9999) }}",
    "join": "{{ (['a' * 999999] * 9999) | join }}",
    "join method": "{{ ('a' * 999999).join(['b'] * 9999) }}",
    "expandtabs": "{{ ('\t' * 999999).expandtabs(9999) }}",
    "wordwrap": "{{ ('a' * 9999999) | wordwrap(1, true, 'b' * 9999) }}",
    "translate": "{{ ('a' * 9999999).translate({97: 'b' * 9999}) }}",
    "indent": "{{ ('\n' * 9999999) | indent('b' * 9999, true, true) }}",
    "pprint": "{{ ([['a' * 9999] * 9999] * 999) | pprint }}",
    "tojson": "{{ ([['a' * 9999] * 9999] * 999) | tojson }}",
    "sum": "{{ (([[0] * 999999] * 9999) | sum(start=[])) | length }}",
}
KINDS = ("prompt", "chat")
# A chat template's steps have no bounds of their own: it ends by its time, by that of its process,
# by memory, or by depth. A few of each are enough in the fast suite.
ENDS_OF_CHATS = {
    "range", "nested loops", "recursion", "string", "string in steps", "power", "slice", "center",
    "deep expression", "deep loops", "long sum", "translate",
}  # fmt: skip


def is_slow(attack: str, kind: str) -> bool:
    """Whether the fast suite leaves it out."""
    return kind == "chat" and attack in EXHAUSTION and attack not in ENDS_OF_CHATS


def render(kind: str, template: str, folder: Path) -> str:
    """The error that a person is told of, or "" where the template only printed something."""
    from pipeline.errors import UsageError
    from pipeline.inputs import prompt_template
    from pipeline.inputs.bad_cell import BadCell
    from pipeline.inputs.prompt_template import PromptTemplate
    from pipeline.prompt_settings import TokenSettings
    from pipeline.tokens import chat_template
    from pipeline.tokens.tokenizer import PromptTokenizer

    prompt_template._MOST_SECONDS = chat_template._MOST_SECONDS = MOST_SECONDS
    prompt_template._GRACE_S = chat_template._GRACE_S = GRACE_S
    try:
        if kind == "prompt":
            known = ["text", "messages", "open", "x"]
            row = {"text": ["a secret"], "messages": [], "open": None, "x": None}
            PromptTemplate(template + "{{ text }}", known).render(row)
            return ""
        path = folder / "template.jinja"
        path.write_text(template)
        tokenizer = PromptTokenizer.load(str(folder), None, TokenSettings(chat_template=path))
        batch = tokenizer.encode_batch([[{"role": "user", "content": "a secret"}]])
        return f"row: {batch.errors[0]}" if batch.errors else ""
    except BadCell as error:
        return f"row: {error}"
    except UsageError as error:
        return f"job: {error}"


def main(folder: Path, slow: bool) -> None:
    """Render what is, or is not, slow."""
    from pipeline.tokens.tokenizer import PromptTokenizer  # noqa: F401  (before memory is limited)

    render("chat", "hello", folder)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for kind in KINDS:
        for name, template in (ESCAPES | EXHAUSTION).items():
            if is_slow(name, kind) != slow:
                continue
            begin = time.monotonic()
            try:
                outcome = render(kind, template, folder)
            except BaseException as error:
                outcome = f"UNNAMED {type(error).__name__}: {error}"
            print(json.dumps([name, kind, outcome, time.monotonic() - begin]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["slow"])
