"""English words that say little of what an image shows; other languages need lists of their own."""

_STOP = """
a an the this that these those some any each every all both few many much more most other another such no
not nor only own same so than too very just also even still yet again once here there where when why how
what which who whom whose i me my mine we us our ours you your yours he him his she her hers it its they
them their theirs myself itself himself herself themselves and or but if because as until while of at by
for with about against between into through during before after above below to from up down in out on off
over under further then near next along across behind beside besides around among upon onto within
without toward towards via per am is are was were be been being have has had having do does did doing can
could will would shall should may might must get gets got getting go goes going gone come comes coming
make makes made making take takes taken taking put puts seem seems let lets use uses used using one ones
two three four five six seven eight nine ten first second third don't doesn't
isn't aren't wasn't weren't can't it's i'm that's
"""

_GENERIC = """
image images img picture pictures pic pics photo photos photograph photographs photography stock
illustration illustrations vector vectors clipart graphic graphics icon icons png jpg jpeg gif webp svg
pdf file files download free hd 4k wallpaper wallpapers background backgrounds thumbnail thumbnails
screenshot screenshots view views shot shots scene close closeup close-up front rear top side bottom
isolated royalty editorial print prints product item items thing things stuff something anything page
website site web com www http https html new best sale buy price shop online
"""

_NOT_NOUNS = """
red yellow green blue purple violet pink brown black white grey gray dark bright pale
colorful colourful big small large little tiny huge tall short long wide narrow old young good bad better
nice great beautiful pretty cute lovely amazing awesome cool funny happy sad hot cold warm fresh modern
vintage classic different various several full empty open closed high low deep soft hard left right
middle see sees seen look looks show shows shown showing stand stands sit sits lie lies hold holds wear
wears walk walks run runs eat eats play plays ride rides fly flies hang hangs love loves like likes want
need enjoy click read learn find found know think say says said today tomorrow yesterday now always never
"""

# function words, and verbs of no meaning
STOP = frozenset(_STOP.split())
# what every image of the web is called
GENERIC = frozenset(_GENERIC.split())
# what stands beside a noun, or in its place where a caption names nothing
NOT_NOUNS = frozenset(_NOT_NOUNS.split())
