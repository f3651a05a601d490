"""Arabic captions: gender, the dual, and number words of the opposite gender from three on."""

from data_tools.make_tiny.languages.grammar import Relation, Size

# with a masculine noun, with a feminine noun
NUMBERS = {3: ("ثلاثة", "ثلاث"), 4: ("أربعة", "أربع")}
# masculine, feminine (also of every plural here), masculine dual, feminine dual
COLORS = {
    "red": ("أحمر", "حمراء", "أحمران", "حمراوان"),
    "yellow": ("أصفر", "صفراء", "أصفران", "صفراوان"),
    "green": ("أخضر", "خضراء", "أخضران", "خضراوان"),
    "turquoise": ("فيروزي", "فيروزية", "فيروزيان", "فيروزيتان"),
    "blue": ("أزرق", "زرقاء", "أزرقان", "زرقاوان"),
    "purple": ("بنفسجي", "بنفسجية", "بنفسجيان", "بنفسجيتان"),
    "pink": ("وردي", "وردية", "ورديان", "ورديتان"),
    "brown": ("بني", "بنية", "بنيان", "بنيتان"),
}
# feminine, singular, dual, plural
SHAPES = {
    "circle": (True, "دائرة", "دائرتان", "دوائر"),
    "square": (False, "مربع", "مربعان", "مربعات"),
    "triangle": (False, "مثلث", "مثلثان", "مثلثات"),
    "star": (True, "نجمة", "نجمتان", "نجمات"),
    "heart": (False, "قلب", "قلبان", "قلوب"),
    "ring": (True, "حلقة", "حلقتان", "حلقات"),
    "cross": (False, "صليب", "صليبان", "صلبان"),
    "diamond": (False, "معين", "معينان", "معينات"),
    "crescent": (False, "هلال", "هلالان", "أهلة"),
    "arrow": (False, "سهم", "سهمان", "أسهم"),
}
SIZES = {"large": ("كبير", "كبيرة"), "small": ("صغير", "صغيرة")}
BACKGROUNDS = {"white": "بيضاء", "grey": "رمادية", "beige": "بيج"}
RELATIONS = {"left": "إلى يسار", "right": "إلى يمين", "above": "فوق", "below": "تحت"}


class Arabic:
    """Agreement in gender and number; plurals of things take the feminine singular adjective."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        feminine, singular, dual, plural = SHAPES[shape]
        if count == 2:
            return f"{dual} {COLORS[color][2 + feminine]}"
        if count > 2:
            return f"{NUMBERS[count][feminine]} {plural} {COLORS[color][1]}"
        phrase = f"{singular} {COLORS[color][feminine]}"
        return f"{phrase} {SIZES[size][feminine]}" if size else phrase

    def shape_alone(self, shape: str) -> str:
        return SHAPES[shape][1]

    def join(self, phrases: list[str]) -> str:
        return " و".join(phrases)

    def on_background(self, phrase: str, background: str) -> str:
        return f"{phrase} على خلفية {BACKGROUNDS[background]}"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        return f"{self.group(1, *first)} {RELATIONS[relation]} {self.group(1, *second)}"
