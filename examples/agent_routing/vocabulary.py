"""The words that fill the slots of the templates: rooms, floors, devices by domain, free text. Not from the dataset."""

from __future__ import annotations

Words = dict[str, tuple[str, ...]]  # by language
AREAS: Words = {
    "en": (
        *("kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "dining room", "attic"),
        *("basement", "nursery", "guest room", "laundry room", "garden", "patio", "study", "balcony", "workshop"),
    ),
    "vi": (
        *("phòng khách", "phòng bếp", "phòng ngủ", "phòng tắm", "phòng làm việc", "nhà xe", "hành lang", "phòng ăn"),
        *("ban công", "sân vườn", "phòng giặt", "phòng trẻ em", "tầng hầm", "phòng đọc sách"),
    ),
}
FLOORS: Words = {
    "en": ("first", "second", "ground", "upper", "lower", "top", "main"),
    "vi": ("tầng một", "tầng hai", "tầng trệt"),
}
LIGHTS: Words = {
    "en": ("desk lamp", "ceiling light", "reading lamp", "bedside lamp", "christmas tree", "porch light", "chandelier"),
    "vi": ("đèn bàn", "đèn trần", "đèn đọc sách", "đèn ngủ", "đèn hiên", "đèn chùm"),
}
SWITCHES: Words = {
    "en": ("coffee machine", "heater", "humidifier", "water pump", "dishwasher", "toaster", "air purifier"),
    "vi": ("máy pha cà phê", "máy sưởi", "máy tạo ẩm", "máy bơm nước", "máy rửa bát", "máy lọc không khí"),
}
FANS: Words = {
    "en": ("ceiling fan", "tower fan", "exhaust fan", "desk fan", "pedestal fan", "bathroom fan"),
    "vi": ("quạt trần", "quạt đứng", "quạt bàn", "quạt hút"),
}
PLAYERS: Words = {
    "en": ("tv", "soundbar", "record player", "kitchen speaker", "stereo", "home theater", "smart display"),
    "vi": ("tivi", "loa thanh", "loa bếp", "dàn âm thanh", "loa thông minh"),
}
COVERS: Words = {
    "en": ("roller blind", "patio awning", "left curtain", "skylight", "pergola roof", "front gate", "bay window"),
    "vi": ("rèm cuốn", "mái hiên", "rèm trái", "cửa sổ trời", "cổng trước"),
}
LOCKS: Words = {
    "en": ("front door", "back door", "side entrance", "garden gate", "safe", "bike shed"),
    "vi": ("cửa trước", "cửa sau", "cổng vườn", "két sắt", "cửa bên"),
}
VALVES: Words = {
    "en": ("water valve", "gas valve", "sprinkler", "main valve", "drip line"),
    "vi": ("van nước", "van gas", "van tưới", "van chính"),
}
CLIMATES: Words = {
    "en": ("thermostat", "air conditioner", "heat pump", "radiator"),
    "vi": ("máy điều hòa", "máy nhiệt", "máy bơm nhiệt"),
}
SENSORS: Words = {
    "en": ("outdoor temperature", "rain gauge", "power meter", "water level", "air quality", "battery level"),
    "vi": ("nhiệt độ ngoài trời", "lượng mưa", "công tơ điện", "mực nước", "chất lượng không khí"),
}
BINARY_SENSORS: Words = {
    "en": ("mailbox", "motion sensor", "smoke detector", "fridge door", "leak sensor", "cat flap"),
    "vi": ("hộp thư", "cảm biến chuyển động", "cảm biến khói", "cửa tủ lạnh", "cảm biến rò nước"),
}
PEOPLE: Words = {
    "en": ("alice", "bob", "grandma", "daniel", "maria", "uncle joe"),
    "vi": ("an", "bình", "bà ngoại", "minh", "thảo"),
}
SCENES: Words = {
    "en": ("movie night", "good morning", "dinner party", "romantic evening", "bedtime", "cleaning mode"),
    "vi": ("xem phim", "buổi sáng", "tiệc tối", "đi ngủ", "thư giãn"),
}
SCRIPTS: Words = {
    "en": ("water the plants", "leaving home", "feed the fish", "vacation mode"),
    "vi": ("tưới cây", "rời nhà", "cho cá ăn", "đi nghỉ"),
}
NAMES: dict[
    str, Words
] = {  # by Home Assistant's domain; a template's `requires_context` says which domains its {name} may be of
    "binary_sensor": BINARY_SENSORS,
    "button": SCRIPTS,
    "climate": CLIMATES,
    "cover": COVERS,
    "fan": FANS,
    "input_boolean": SWITCHES,
    "input_button": SCRIPTS,
    "light": LIGHTS,
    "lock": LOCKS,
    "media_player": PLAYERS,
    "person": PEOPLE,
    "scene": SCENES,
    "script": SCRIPTS,
    "sensor": SENSORS,
    "switch": SWITCHES,
    "valve": VALVES,
}
FREE_TEXT: dict[str, Words] = {  # lists that match anything
    "search_query": {
        "en": (
            *("abbey road", "the dark side of the moon", "bach cello suites", "lofi beats", "hey jude", "nina simone"),
            *("jazz classics", "the godfather", "planet earth", "radiohead", "miles davis", "summer hits"),
        ),
        "vi": ("nhạc trịnh", "nhạc không lời", "sơn tùng"),
    },
    "timer_name": {
        "en": ("pizza", "pasta", "egg", "laundry", "tea", "workout", "oven", "homework", "nap", "chicken", "bread"),
        "vi": ("cơm", "trứng", "giặt đồ"),
    },
    "timer_command": {
        "en": (
            *("turn off the lights", "open the garage door", "lock the front door", "turn on the heater"),
            *("close the blinds", "start the coffee machine", "turn down the music"),
        ),
        "vi": ("tắt đèn", "mở cửa"),
    },
    "zone": {
        "en": ("home", "work", "school", "gym", "daycare", "park"),
        "vi": ("nhà", "trường", "công ty", "phòng gym", "công viên"),
    },
}


def values(list_name: str, language: str, domains: tuple[str, ...]) -> tuple[str, ...] | None:
    """The words for a list that the dataset leaves to the household; None for a list that it defines itself."""
    if list_name == "area":
        return AREAS[language]
    if list_name == "floor":
        return FLOORS[language]
    if list_name == "name":
        return tuple(name for domain in domains or ("light", "switch") for name in NAMES[domain][language])
    free = FREE_TEXT.get(list_name)
    return free[language] if free else None
