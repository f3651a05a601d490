"""Chinese captions (simplified)."""

from data_tools.make_tiny.languages.grammar import Relation, Size

NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四"}
COLORS = {
    "red": "红色", "yellow": "黄色", "green": "绿色", "turquoise": "青色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "brown": "棕色",
}  # fmt: skip
SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "heart": "心形", 
    "ring": "圆环", "cross": "十字", "diamond": "菱形", "crescent": "月牙", "arrow": "箭头",
}  # fmt: skip
SIZES = {"large": "大", "small": "小"}
BACKGROUNDS = {"white": "白色", "grey": "灰色", "beige": "米色"}
RELATIONS = {"left": "左边", "right": "右边", "above": "上方", "below": "下方"}


class Chinese:
    """No agreement; 个 counts every shape."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        return f"{NUMBERS[count]}个{COLORS[color]}的{SIZES[size] if size else ''}{SHAPES[shape]}"

    def shape_alone(self, shape: str) -> str:
        return f"{NUMBERS[1]}个{SHAPES[shape]}"

    def join(self, phrases: list[str]) -> str:
        *head, last = phrases
        return f"{'、'.join(head)}和{last}" if head else last

    def on_background(self, phrase: str, background: str) -> str:
        return f"{BACKGROUNDS[background]}背景上的{phrase}"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        return f"{self.group(1, *first)}在{self.group(1, *second)}的{RELATIONS[relation]}"
