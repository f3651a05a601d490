"""Spanish captions: the adjective follows its noun and agrees in gender and number."""

from data_tools.make_tiny.languages.grammar import Relation, Size, join_with_commas

NUMBERS = {2: "dos", 3: "tres", 4: "cuatro"}
# masculine, feminine, masculine plural, feminine plural
COLORS = {
    "red": ("rojo", "roja", "rojos", "rojas"),
    "yellow": ("amarillo", "amarilla", "amarillos", "amarillas"),
    "green": ("verde", "verde", "verdes", "verdes"),
    "turquoise": ("turquesa", "turquesa", "turquesas", "turquesas"),
    "blue": ("azul", "azul", "azules", "azules"),
    "purple": ("morado", "morada", "morados", "moradas"),
    "pink": ("rosa", "rosa", "rosas", "rosas"),
    "brown": ("marrón", "marrón", "marrones", "marrones"),
}
# feminine, singular, plural
SHAPES = {
    "circle": (False, "círculo", "círculos"),
    "square": (False, "cuadrado", "cuadrados"),
    "triangle": (False, "triángulo", "triángulos"),
    "star": (True, "estrella", "estrellas"),
    "heart": (False, "corazón", "corazones"),
    "ring": (False, "anillo", "anillos"),
    "cross": (True, "cruz", "cruces"),
    "diamond": (False, "rombo", "rombos"),
    "crescent": (True, "media luna", "medias lunas"),
    "arrow": (True, "flecha", "flechas"),
}
SIZES = {"large": ("grande", "grande"), "small": ("pequeño", "pequeña")}
BACKGROUNDS = {"white": "blanco", "grey": "gris", "beige": "beige"}
RELATIONS = {
    "left": "a la izquierda de", "right": "a la derecha de", "above": "encima de", "below": "debajo de",
}  # fmt: skip


class Spanish:
    """Agreement in gender and number."""

    def group(self, count: int, color: str, shape: str, size: Size | None = None) -> str:
        feminine, singular, plural = SHAPES[shape]
        if count > 1:
            return f"{NUMBERS[count]} {plural} {COLORS[color][2 + feminine]}"
        phrase = f"{'una' if feminine else 'un'} {singular} {COLORS[color][feminine]}"
        return f"{phrase} {SIZES[size][feminine]}" if size else phrase

    def shape_alone(self, shape: str) -> str:
        feminine, singular, _ = SHAPES[shape]
        return f"{'una' if feminine else 'un'} {singular}"

    def join(self, phrases: list[str]) -> str:
        return join_with_commas(phrases, "y")

    def on_background(self, phrase: str, background: str) -> str:
        return f"{phrase} sobre un fondo {BACKGROUNDS[background]}"

    def relate(self, first: tuple[str, str], relation: Relation, second: tuple[str, str]) -> str:
        return f"{self.group(1, *first)} {RELATIONS[relation]} {self.group(1, *second)}"
