"""Short stories of the corpus, in English and Chinese: a plot is a list of slots, each with several sentences."""

import re
from random import Random

from minicpm_data.pico_corpus import world

THINGS = world.words("ball kite hat book bell key map boat drum lamp cup box coin scarf toy basket")
PLACES = world.words("park garden forest river village school house hill beach farm market lake")
FOODS = world.words("apples bread cake soup berries nuts honey rice pears cookies")
COLOURS = world.words("red blue green yellow white black brown purple")
SKILLS = world.words("swim fly sing dance read jump paint cook climb count")

BEGIN = [
    "Once upon a time there was a {mood} {hero} named {name}.",
    "One day a {mood} {hero} named {name} went to the {place}.",
    "There was a {hero} named {name}. {He} lived near the {place}.",
    "{name} was a {mood} little {hero}.",
    "In a small house by the {place} lived a {hero} named {name}.",
]
END = [
    "{name} was very happy.",
    "They were friends from that day on.",
    "That night {name} slept well.",
    "{name} smiled all the way home.",
    "It was a good day.",
    "And so {name} learned to be kind.",
]
PLOTS = [
    [
        ["{name} had a {colour} {thing}.", "{name} loved {his} {colour} {thing} very much."],
        ["One day {he} lost it in the {place}.", "In the morning the {thing} was gone."],
        ["{He} looked under a tree and behind a stone, but found nothing.", "{He} looked everywhere and began to cry."],
        ['A {other} came and asked, "Why are you sad?"', 'A kind {other} said, "I will help you."'],
        ["They looked together until they saw something {colour}.", "They walked to the {place2} and looked there."],
        ["It was the {thing}!", "The {thing} was in the grass!", "There it was, next to the {place2}!"],
        ['"Thank you," said {name}.', "{name} thanked the {other} and gave a big hug."],
    ],
    [
        ["{name} had no friends and wanted to play.", "{name} was alone in the {place} and felt sad."],
        ["Then {he} met a {other}.", "By the {place2} {he} saw a {other}."],
        ['"Do you want to play with my {thing}?" asked {name}.', '"What is your name?" asked {name}.'],
        ["The {other} said yes.", 'The {other} said, "I am {name2}. Let us play!"'],
        ["They played with the {thing} all day.", "They ran and laughed until the sun went down."],
    ],
    [
        ["{name} was very hungry.", "{name} had some {food} in a basket."],
        ["{He} went to the {place} to eat {food}.", "{He} sat down by the {place} with the {food}."],
        ["A {other} came. It was hungry too.", 'A small {other} said, "I have nothing to eat."'],
        ["{name} gave half of the {food} to the {other}.", '"We can share," said {name}.'],
        ["They ate together and the {food} tasted good.", "The {other} was full and happy."],
        ["The next day the {other} brought {name} a {colour} {thing}.", "Sharing made the {food} taste better."],
    ],
    [
        ["{name} wanted to learn to {skill}.", "{name} could not {skill}, and that made {him} sad."],
        ["{He} tried, but it was too hard.", "The first time {he} tried, {he} fell down."],
        ['"Do not give up," said the {other}.', 'A wise {other} said, "Try again, slowly."'],
        ["{name} tried every day at the {place}.", "So {name} tried again and again."],
        ["After a week {he} could {skill}!", "At last {he} could {skill} better than anyone!"],
        ['"Look at me!" {he} called.', "Everyone in the {place2} came to see."],
    ],
    [
        ["One night there was a big storm.", "It was dark and the wind was loud."],
        ["{name} was afraid and hid under the bed.", "{name} heard a noise outside and was scared."],
        ['"Who is there?" {he} asked.', "{He} took {his} {colour} {thing} and opened the door."],
        ["It was only a wet {other}.", "A little {other} stood in the rain."],
        ["{name} let the {other} in and gave it warm {food}.", "{name} made a fire and they sat close to it."],
        ["In the morning the sun came out.", "Soon the rain stopped and the stars came out."],
    ],
    [
        ["{name} found an old map.", "{name} found a {colour} box with a map in it."],
        ["The map showed the way to the {place2}.", '"There must be gold!" said {name}.'],
        ["{He} walked over the hill with a {other}.", "A {other} showed {him} the way."],
        ["They dug and dug under a big tree.", "They crossed the river on a small boat."],
        ["There was no gold, only a {thing}.", "In the ground they found a {colour} {thing}."],
        ['"The walk was the best part," said the {other}.', "They took the {thing} home and laughed."],
    ],
]

THINGS_ZH = world.words("皮球 风筝 帽子 图书 铃铛 钥匙 小船 小鼓 杯子 盒子 围巾 玩具")
PLACES_ZH = world.words("公园 花园 森林 河边 村庄 学校 山坡 海边 农场 湖边")
FOODS_ZH = world.words("苹果 面包 蛋糕 果子 蜂蜜 米饭 桃子 饼干")
COLOURS_ZH = world.words("红色 蓝色 绿色 黄色 白色 黑色 紫色")
SKILLS_ZH = world.words("游泳 唱歌 跳舞 画画 做饭 爬树 数数 读书")
BEGIN_ZH = [
    "从前有一只{mood}的{hero}，名叫{name}。",
    "一天，{mood}的{hero}{name}来到{place}。",
    "{hero}{name}住在{place}旁边。",
]
END_ZH = [
    "{name}非常高兴。",
    "从此他们成了好朋友。",
    "那天晚上，{name}睡得很香。",
    "{name}笑着回家了。",
    "这真是美好的一天。",
]
PLOTS_ZH = [
    [
        ["{name}有一个{colour}的{thing}。", "{name}最喜欢{colour}的{thing}。"],
        ["有一天，{thing}在{place}丢了。", "早上，{thing}不见了。"],
        ["{name}到处找，可是找不到。", "{name}急得哭了起来。"],
        ["{other}走过来说：“我来帮你。”", "{other}问：“你为什么难过？”"],
        ["他们一起去{place2}找。", "他们找了很久很久。"],
        ["原来{thing}在草地上！", "{thing}就在一棵大树下！"],
        ["{name}说：“谢谢你！”", "{name}高兴地抱住了{other}。"],
    ],
    [
        ["{name}没有朋友，觉得很孤单。", "{name}想找人一起玩。"],
        ["在{place2}，{name}遇见了{other}。", "这时{other}走了过来。"],
        ["{name}问：“你想和我一起玩{thing}吗？”", "{name}说：“我们做朋友吧。”"],
        ["{other}说：“好呀！”", "{other}笑着点了点头。"],
        ["他们玩了一整天。", "他们又跑又跳，一直玩到太阳下山。"],
    ],
    [
        ["{name}肚子饿了。", "{name}有一些{food}。"],
        ["{name}坐在{place}吃{food}。", "{name}带着{food}去{place2}。"],
        ["{other}说：“我也很饿。”", "{other}没有东西吃。"],
        ["{name}把一半{food}分给了{other}。", "{name}说：“我们一起吃吧。”"],
        ["他们吃得很开心。", "大家一起吃，{food}更好吃。"],
        ["第二天，{other}送给{name}一个{colour}的{thing}。", ""],
    ],
    [
        ["{name}想学{skill}。", "{name}不会{skill}，心里很难过。"],
        ["第一次没有成功。", "{name}觉得太难了。"],
        ["{other}说：“不要放弃。”", "{other}说：“慢慢来，再试一次。”"],
        ["{name}每天都在{place}练习。", "{name}试了一次又一次。"],
        ["一个星期以后，{name}终于学会了{skill}！", "最后，{name}学会了{skill}！"],
    ],
    [
        ["一天晚上，下起了大雨。", "天黑了，风很大。"],
        ["{name}听见门外有声音，很害怕。", "{name}躲在床下，不敢出来。"],
        ["原来是{other}站在雨里。", "打开门一看，是一只湿透的{other}。"],
        ["{name}请{other}进来，给它吃{food}。", "{name}生起火，他们坐在一起。"],
        ["早上，太阳出来了。", "不久雨停了，星星出来了。"],
    ],
]


def _told(random: Random, begin: list[str], plots: list[list[list[str]]], end: list[str], fields: dict) -> list[str]:
    slots = [begin, *random.choice(plots), end]
    return [sentence.format(**fields) for sentence in map(random.choice, slots) if sentence]


def english(random: Random, hero: str) -> str:
    """A story of 6 to 9 sentences about ``hero``, in English."""
    girl = hero == "girl" or hero != "boy" and random.random() < 0.5
    names, other_names = (world.GIRLS, world.BOYS) if girl else (world.BOYS, world.GIRLS)
    place, place2 = random.sample(PLACES, 2)
    animals = [h for h in world.HEROES if h not in (hero, "boy", "girl", "robot")]
    pronouns = ("She", "she", "her", "her") if girl else ("He", "he", "his", "him")
    fields = {
        "hero": hero,
        "name": random.choice(names),
        "name2": random.choice(other_names),
        "other": random.choice(animals),
        "mood": random.choice(["little", "happy", "brave", "kind", "small", "clever", "shy"]),
        "place": place,
        "place2": place2,
        "thing": random.choice(THINGS),
        "food": random.choice(FOODS),
        "colour": random.choice(COLOURS),
        "skill": random.choice(SKILLS),
        **dict(zip(("He", "he", "his", "him"), pronouns, strict=True)),
    }
    text = " ".join(_told(random, BEGIN, PLOTS, END, fields))
    return (
        re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        .replace("little little", "little")
        .replace("small little", "small")
    )


def chinese(random: Random, hero: str) -> str:
    """A story about ``hero``, in Chinese."""
    place, place2 = random.sample(PLACES_ZH, 2)
    animals = [h for h in world.HEROES_ZH if h not in (hero, "小男孩", "小女孩", "机器人")]
    fields = {
        "hero": hero,
        "name": random.choice(world.NAMES_ZH),
        "other": random.choice(animals),
        "mood": random.choice(["可爱", "快乐", "勇敢", "善良", "聪明", "害羞"]),
        "place": place,
        "place2": place2,
        "thing": random.choice(THINGS_ZH),
        "food": random.choice(FOODS_ZH),
        "colour": random.choice(COLOURS_ZH),
        "skill": random.choice(SKILLS_ZH),
    }
    text = "".join(_told(random, BEGIN_ZH, PLOTS_ZH, END_ZH, fields))
    measure = "个" if hero in ("小男孩", "小女孩", "机器人") else "匹" if hero == "小马" else "只"
    return text.replace(f"一只{fields['mood']}的{hero}", f"一{measure}{fields['mood']}的{hero}")


REQUESTS = [
    "Tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Write a story about {x}.",
    "Can you tell me a story about {x}?",
]
REQUESTS_ZH = ["讲一个关于{x}的故事。", "请给我讲一个{x}的故事。", "写一个关于{x}的小故事。"]


def story_document(random: Random) -> str:
    if random.random() < 0.6:
        return english(random, random.choice(world.HEROES))
    return chinese(random, random.choice(world.HEROES_ZH))


def story_turn(random: Random) -> tuple[str, str]:
    if random.random() < 0.6:
        hero = random.choice(world.HEROES)
        article = "an" if hero[0] in "aeiou" else "a"
        return random.choice(REQUESTS).format(x=f"{article} {hero}"), english(random, hero)
    hero = random.choice(world.HEROES_ZH)
    return random.choice(REQUESTS_ZH).format(x=hero), chinese(random, hero)
