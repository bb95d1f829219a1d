"""Write the demo base with room for long prompts and a chat template with tools: module_with_tools.py DIRECTORY"""

import json
import shutil
import sys
from pathlib import Path

from qsun.demo import base_directory

POSITIONS = 16384  # tools and schemas are long in characters, which are its tokens; what it says of them is no matter
TEMPLATE = """\
{%- if tools %}{{ 'You may call: <tool_call>{name, arguments}</tool_call>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}{{ '[' + message.role + ']' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


def write(directory: Path) -> None:
    shutil.copytree(base_directory(), directory)
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": POSITIONS}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
