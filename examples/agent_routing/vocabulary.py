"""The words that fill the slots of the templates: rooms, floors, devices by domain, free text. Not from the dataset."""

from __future__ import annotations

Words = dict[str, tuple[str, ...]]  # by language
AREAS: Words = {
    "en": (
        *("kitchen", "living room", "bedroom", "bathroom", "office", "garage"),
        *("hallway", "dining room", "attic", "basement", "nursery", "guest room"),
        *("laundry room", "garden", "patio", "study", "balcony", "workshop"),
        *("pantry", "library", "sunroom", "playroom", "gym", "music room"),
        *("wine cellar", "mud room", "porch", "terrace", "sauna", "master bedroom"),
        *("front yard", "home theater", "greenhouse", "tool shed"),
    ),
    "vi": (
        *("phòng khách", "phòng bếp", "phòng ngủ", "phòng tắm", "phòng làm việc", "nhà xe"),
        *("hành lang", "phòng ăn", "ban công", "sân vườn", "phòng giặt", "phòng trẻ em"),
        *("tầng hầm", "phòng đọc sách", "sân thượng", "phòng thờ", "nhà kho", "phòng tập"),
        *("phòng nhạc", "sân trước"),
    ),
}
FLOORS: Words = {
    "en": (
        *("first", "second", "third", "ground", "upper", "lower"),
        *("top", "main", "bottom", "middle"),
    ),
    "vi": ("tầng một", "tầng hai", "tầng trệt"),
}
LIGHTS: Words = {
    "en": (
        *("desk lamp", "ceiling light", "reading lamp", "bedside lamp", "christmas tree", "porch light"),
        *("chandelier", "floor lamp", "spotlight", "led strip", "night light", "lava lamp"),
        *("mirror light", "bookshelf light", "star projector"),
    ),
    "vi": (
        *("đèn bàn", "đèn trần", "đèn đọc sách", "đèn ngủ", "đèn hiên", "đèn chùm"),
        *("đèn tường", "đèn cầu thang", "đèn gương"),
    ),
}
SWITCHES: Words = {
    "en": (
        *("coffee machine", "heater", "humidifier", "water pump", "dishwasher", "toaster"),
        *("air purifier", "kettle", "printer", "fish tank", "electric blanket", "fountain"),
        *("washing machine", "rice cooker"),
    ),
    "vi": (
        *("máy pha cà phê", "máy sưởi", "máy tạo ẩm", "máy bơm nước", "máy rửa bát", "máy lọc không khí"),
        *("ấm đun nước", "máy giặt", "nồi cơm", "bể cá"),
    ),
}
FANS: Words = {
    "en": (
        *("ceiling fan", "tower fan", "exhaust fan", "desk fan", "pedestal fan", "bathroom fan"),
        *("range hood", "window fan", "whole house fan", "turbo fan", "box fan"),
    ),
    "vi": ("quạt trần", "quạt đứng", "quạt bàn", "quạt hút", "quạt treo tường", "quạt thông gió"),
}
PLAYERS: Words = {
    "en": (
        *("tv", "soundbar", "record player", "kitchen speaker", "stereo", "smart display"),
        *("boombox", "media center", "projector", "cd player", "shower speaker", "radio"),
        *("game console", "amplifier"),
    ),
    "vi": (
        *("tivi", "loa thanh", "loa bếp", "dàn âm thanh", "loa thông minh", "máy chiếu"),
        *("đầu đĩa", "đài"),
    ),
}
COVERS: Words = {
    "en": (
        *("roller blind", "patio awning", "left curtain", "skylight", "pergola roof", "front gate"),
        *("bay window", "right curtain", "sun shade", "sliding door", "pool cover", "roof hatch"),
        *("venetian blind", "barn door"),
    ),
    "vi": (
        *("rèm cuốn", "mái hiên", "rèm trái", "cửa sổ trời", "cổng trước", "rèm phải"),
        *("cửa trượt", "mái che bể bơi"),
    ),
}
LOCKS: Words = {
    "en": (
        *("front door", "back door", "side entrance", "garden gate", "safe", "bike shed"),
        *("cellar door", "mailbox lock", "gun cabinet", "patio door", "wine cabinet", "main entrance"),
    ),
    "vi": (
        *("cửa trước", "cửa sau", "cổng vườn", "két sắt", "cửa bên", "cửa hầm"),
        *("tủ rượu",),
    ),
}
VALVES: Words = {
    "en": (
        *("water valve", "gas valve", "sprinkler", "main valve", "drip line", "hose valve"),
        *("irrigation", "boiler valve", "pool valve"),
    ),
    "vi": ("van nước", "van gas", "van tưới", "van chính", "van hồ bơi", "van vòi"),
}
CLIMATES: Words = {
    "en": ("thermostat", "air conditioner", "heat pump", "radiator", "floor heating", "mini split"),
    "vi": ("máy điều hòa", "máy nhiệt", "máy bơm nhiệt", "sàn sưởi", "lò sưởi"),
}
SENSORS: Words = {
    "en": (
        *("outdoor temperature", "rain gauge", "power meter", "water level", "air quality", "battery level"),
        *("wind speed", "humidity sensor", "soil moisture", "light sensor", "gas meter", "noise level"),
    ),
    "vi": (
        *("nhiệt độ ngoài trời", "lượng mưa", "công tơ điện", "mực nước", "chất lượng không khí", "tốc độ gió"),
        *("độ ẩm đất",),
    ),
}
BINARY_SENSORS: Words = {
    "en": (
        *("mailbox", "motion sensor", "smoke detector", "fridge door", "leak sensor", "cat flap"),
        *("doorbell", "vibration sensor", "freezer", "bed sensor", "driveway sensor"),
    ),
    "vi": (
        *("hộp thư", "cảm biến chuyển động", "cảm biến khói", "cửa tủ lạnh", "cảm biến rò nước", "chuông cửa"),
        *("cảm biến rung",),
    ),
}
PEOPLE: Words = {
    "en": (
        *("alice", "bob", "grandma", "daniel", "maria", "uncle joe"),
        *("priya", "sofia", "kenji", "omar", "lucas", "emma"),
        *("aunt may", "dad"),
    ),
    "vi": (
        *("an", "bình", "bà ngoại", "minh", "thảo", "ông nội"),
        *("lan", "hùng", "mai"),
    ),
}
SCENES: Words = {
    "en": (
        *("movie night", "good morning", "dinner party", "romantic evening", "bedtime", "cleaning mode"),
        *("game time", "deep focus", "sunset", "rainy day", "wake up call", "yoga hour"),
        *("christmas eve",),
    ),
    "vi": (
        *("xem phim", "buổi sáng", "tiệc tối", "đi ngủ", "thư giãn", "đọc sách"),
        *("tập trung", "hoàng hôn"),
    ),
}
SCRIPTS: Words = {
    "en": (
        *("water the plants", "leaving home", "feed the fish", "vacation mode", "evening routine", "test the alarm"),
        *("warm up the car", "morning news"),
    ),
    "vi": ("tưới cây", "rời nhà", "cho cá ăn", "đi nghỉ", "kiểm tra báo động", "chào buổi tối"),
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
            *("abbey road", "the dark side of the moon", "bach cello suites", "lofi beats", "hey jude"),
            *("nina simone", "jazz classics", "the godfather", "planet earth", "radiohead"),
            *("miles davis", "summer hits", "bohemian rhapsody", "taylor swift", "ocean waves"),
            *("breaking bad", "the beatles", "mozart", "thriller", "purple rain"),
            *("the daily", "star wars", "sesame street", "nirvana", "whale songs"),
            *("country roads", "daft punk", "morning yoga", "the simpsons", "harry potter"),
            *("rain sounds", "adele", "bob dylan", "kind of blue", "back in black"),
            *("salsa party", "the lion king", "true crime", "fleetwood mac", "clair de lune"),
        ),
        "vi": ("nhạc trịnh", "nhạc không lời", "sơn tùng"),
    },
    "timer_name": {
        "en": (
            *("pizza", "pasta", "egg", "laundry", "tea"),
            *("workout", "oven", "homework", "nap", "chicken"),
            *("bread", "rice", "cookie", "meditation", "bath"),
            *("reading", "piano", "turkey", "dishwasher", "parking"),
            *("soup", "steak", "plank", "medicine", "break"),
            *("roast",),
        ),
        "vi": ("cơm", "trứng", "giặt đồ"),
    },
    "timer_command": {
        "en": (
            *(
                "turn off the lights",
                "open the garage door",
                "lock the front door",
                "turn on the heater",
                "close the blinds",
            ),
            *("start the coffee machine", "turn down the music", "stop the fan", "play some jazz", "close the gate"),
            *("turn on the sprinkler", "pause the tv", "unlock the back door", "switch off the kettle"),
        ),
        "vi": ("tắt đèn", "mở cửa"),
    },
    "zone": {
        "en": (
            *("home", "work", "school", "gym", "daycare"),
            *("park", "library", "church", "airport", "beach"),
            *("office", "market"),
        ),
        "vi": (
            *("nhà", "trường", "công ty", "phòng gym", "công viên"),
            *("thư viện", "chợ", "sân bay"),
        ),
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
