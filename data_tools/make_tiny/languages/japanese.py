"""Japanese captions."""

from data_tools.make_tiny.languages.grammar import Relation, Size

NUMBERS = {2: "二つの", 3: "三つの", 4: "四つの"}
COLORS = {
    "red": "赤い", "yellow": "黄色い", "green": "緑色の", "turquoise": "ターコイズ色の", 
    "blue": "青い", "purple": "紫色の", "pink": "ピンク色の", "brown": "茶色い",
}  # fmt: skip
SHAPES = {
    "circle": "円", "square": "正方形", "triangle": "三角形", "star": "星", "heart": "ハート", "ring": "輪",
    "cross": "十字", "diamond": "ひし形", "crescent": "三日月", "arrow": "矢印",
}  # fmt: skip
SIZES = {"large": "大きな", "small": "小さな"}
BACKGROUNDS = {"white": "白い", "grey": "灰色の", "beige": "ベージュの"}
RELATIONS = {"left": "左", "right": "右", "above": "上", "below": "下"}


class Japanese:
    """No agreement; what is known (place, background) comes first."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        lead = NUMBERS[count] if count > 1 else SIZES[size] if size else ""
        return f"{lead}{COLORS[color]}{SHAPES[shape]}"

    def shape_alone(self, shape: str) -> str:
        return SHAPES[shape]

    def join(self, phrases: list[str]) -> str:
        return "と".join(phrases)

    def on_background(self, phrase: str, background: str) -> str:
        return f"{BACKGROUNDS[background]}背景に{phrase}"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        return f"{self.group(1, *second)}の{RELATIONS[relation]}にある{self.group(1, *first)}"
