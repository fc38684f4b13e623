"""The small fixed world of the corpus: all names and words that its sentences contain."""

# country, capital, continent, and the same in Chinese
COUNTRIES = [
    tuple(line.split(","))
    for line in """China,Beijing,Asia,中国,北京,亚洲
Japan,Tokyo,Asia,日本,东京,亚洲
India,New Delhi,Asia,印度,新德里,亚洲
Thailand,Bangkok,Asia,泰国,曼谷,亚洲
Vietnam,Hanoi,Asia,越南,河内,亚洲
Mongolia,Ulaanbaatar,Asia,蒙古,乌兰巴托,亚洲
Indonesia,Jakarta,Asia,印度尼西亚,雅加达,亚洲
Nepal,Kathmandu,Asia,尼泊尔,加德满都,亚洲
Iran,Tehran,Asia,伊朗,德黑兰,亚洲
Iraq,Baghdad,Asia,伊拉克,巴格达,亚洲
South Korea,Seoul,Asia,韩国,首尔,亚洲
the Philippines,Manila,Asia,菲律宾,马尼拉,亚洲
France,Paris,Europe,法国,巴黎,欧洲
Germany,Berlin,Europe,德国,柏林,欧洲
Italy,Rome,Europe,意大利,罗马,欧洲
Spain,Madrid,Europe,西班牙,马德里,欧洲
Portugal,Lisbon,Europe,葡萄牙,里斯本,欧洲
Greece,Athens,Europe,希腊,雅典,欧洲
England,London,Europe,英国,伦敦,欧洲
Ireland,Dublin,Europe,爱尔兰,都柏林,欧洲
Russia,Moscow,Europe,俄罗斯,莫斯科,欧洲
Poland,Warsaw,Europe,波兰,华沙,欧洲
Austria,Vienna,Europe,奥地利,维也纳,欧洲
Hungary,Budapest,Europe,匈牙利,布达佩斯,欧洲
Norway,Oslo,Europe,挪威,奥斯陆,欧洲
Sweden,Stockholm,Europe,瑞典,斯德哥尔摩,欧洲
Finland,Helsinki,Europe,芬兰,赫尔辛基,欧洲
Denmark,Copenhagen,Europe,丹麦,哥本哈根,欧洲
Belgium,Brussels,Europe,比利时,布鲁塞尔,欧洲
Ukraine,Kyiv,Europe,乌克兰,基辅,欧洲
Egypt,Cairo,Africa,埃及,开罗,非洲
Kenya,Nairobi,Africa,肯尼亚,内罗毕,非洲
Morocco,Rabat,Africa,摩洛哥,拉巴特,非洲
Ghana,Accra,Africa,加纳,阿克拉,非洲
Canada,Ottawa,North America,加拿大,渥太华,北美洲
Mexico,Mexico City,North America,墨西哥,墨西哥城,北美洲
Cuba,Havana,North America,古巴,哈瓦那,北美洲
Brazil,Brasilia,South America,巴西,巴西利亚,南美洲
Peru,Lima,South America,秘鲁,利马,南美洲
Chile,Santiago,South America,智利,圣地亚哥,南美洲
Argentina,Buenos Aires,South America,阿根廷,布宜诺斯艾利斯,南美洲
Australia,Canberra,Oceania,澳大利亚,堪培拉,大洋洲
New Zealand,Wellington,Oceania,新西兰,惠灵顿,大洋洲""".splitlines()
]


def words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (pair.partition("=") for pair in text.split())]


# English = Chinese, one to one
WORDS = _pairs(
    "cat=猫 dog=狗 bird=鸟 fish=鱼 horse=马 cow=牛 sheep=羊 pig=猪 duck=鸭子 chicken=鸡 rabbit=兔子 mouse=老鼠 "
    "tiger=老虎 lion=狮子 bear=熊 monkey=猴子 elephant=大象 snake=蛇 frog=青蛙 bee=蜜蜂 ant=蚂蚁 fox=狐狸 wolf=狼 "
    "turtle=乌龟 panda=熊猫 red=红色 blue=蓝色 green=绿色 yellow=黄色 white=白色 black=黑色 brown=棕色 purple=紫色 "
    "orange=橙子 pink=粉色 apple=苹果 banana=香蕉 grape=葡萄 pear=梨 peach=桃子 lemon=柠檬 rice=米饭 bread=面包 "
    "egg=鸡蛋 milk=牛奶 tea=茶 coffee=咖啡 water=水 cake=蛋糕 sugar=糖 salt=盐 soup=汤 meat=肉 vegetable=蔬菜 "
    "one=一 two=二 three=三 four=四 five=五 six=六 seven=七 eight=八 nine=九 ten=十 sun=太阳 moon=月亮 star=星星 "
    "sky=天空 cloud=云 rain=雨 snow=雪 wind=风 fire=火 river=河 sea=大海 mountain=山 tree=树 flower=花 grass=草 "
    "leaf=叶子 stone=石头 house=房子 door=门 window=窗户 table=桌子 chair=椅子 bed=床 lamp=灯 clock=钟 book=书 "
    "pen=钢笔 paper=纸 school=学校 teacher=老师 student=学生 friend=朋友 mother=妈妈 father=爸爸 brother=兄弟 "
    "sister=姐妹 boy=男孩 girl=女孩 doctor=医生 king=国王 car=汽车 bus=公共汽车 train=火车 ship=船 bicycle=自行车 "
    "plane=飞机 road=路 bridge=桥 city=城市 village=村庄 garden=花园 park=公园 forest=森林 hand=手 foot=脚 head=头 "
    "eye=眼睛 ear=耳朵 nose=鼻子 mouth=嘴 heart=心 hair=头发 eat=吃 drink=喝 run=跑 walk=走 sleep=睡觉 read=读 "
    "write=写 sing=唱歌 dance=跳舞 swim=游泳 fly=飞 laugh=笑 cry=哭 love=爱 help=帮助 big=大 small=小 long=长 "
    "short=短 hot=热 cold=冷 new=新 old=旧 fast=快 slow=慢 happy=高兴 sad=难过 good=好 bad=坏 beautiful=美丽 "
    "day=白天 night=夜晚 morning=早上 evening=晚上 spring=春天 summer=夏天 autumn=秋天 winter=冬天 today=今天 "
    "tomorrow=明天 yesterday=昨天 ball=球 hat=帽子 shoe=鞋子 shirt=衬衫 bag=包 key=钥匙 umbrella=雨伞 gift=礼物 "
    "music=音乐 picture=图画"
)

OPPOSITES = _pairs(
    "big=small long=short hot=cold new=old fast=slow happy=sad good=bad day=night up=down left=right open=closed "
    "black=white high=low hard=soft wet=dry full=empty strong=weak early=late near=far inside=outside clean=dirty "
    "rich=poor light=dark thick=thin loud=quiet easy=difficult first=last true=false"
)
OPPOSITES_ZH = _pairs(
    "大=小 长=短 热=冷 新=旧 快=慢 高兴=难过 好=坏 白天=黑夜 上=下 左=右 开=关 黑=白 高=低 硬=软 湿=干 满=空 强=弱 "
    "早=晚 近=远 里=外 干净=肮脏 富=穷 明亮=黑暗 厚=薄 多=少 真=假 胖=瘦 前=后"
)

COLOURS = _pairs(
    "grass=green snow=white milk=white coal=black blood=red chocolate=brown the_sky=blue the_sea=blue "
    "the_sun=yellow a_banana=yellow a_lemon=yellow a_tomato=red a_strawberry=red a_carrot=orange a_pumpkin=orange "
    "a_crow=black a_frog=green a_leaf=green a_swan=white a_grape=purple a_pig=pink a_cherry=red salt=white "
    "an_eggplant=purple"
)
COLOURS_ZH = _pairs(
    "草=绿色 雪=白色 牛奶=白色 煤=黑色 血=红色 巧克力=棕色 天空=蓝色 大海=蓝色 太阳=黄色 香蕉=黄色 柠檬=黄色 "
    "西红柿=红色 草莓=红色 胡萝卜=橙色 南瓜=橙色 乌鸦=黑色 青蛙=绿色 叶子=绿色 天鹅=白色 葡萄=紫色 盐=白色 "
    "樱桃=红色 茄子=紫色"
)

SOUNDS = _pairs(
    "cat=meow dog=woof cow=moo sheep=baa pig=oink duck=quack frog=croak lion=roar bee=buzz mouse=squeak "
    "horse=neigh owl=hoot snake=hiss wolf=howl crow=caw donkey=hee-haw"
)
SOUNDS_ZH = _pairs("猫=喵喵 狗=汪汪 牛=哞哞 羊=咩咩 鸭子=嘎嘎 青蛙=呱呱 蜜蜂=嗡嗡 老鼠=吱吱 小鸡=叽叽 猪=哼哼")
BABIES = _pairs(
    "cat=kitten dog=puppy cow=calf sheep=lamb horse=foal duck=duckling chicken=chick lion=cub goat=kid pig=piglet "
    "frog=tadpole goose=gosling deer=fawn owl=owlet kangaroo=joey"
)
HOMES = _pairs(
    "bird=nest bee=hive fish=water bear=cave spider=web dog=kennel horse=stable pig=sty rabbit=burrow lion=den "
    "ant=anthill"
)
LEGS = _pairs(
    "cat=4 dog=4 horse=4 cow=4 sheep=4 tiger=4 elephant=4 bird=2 duck=2 chicken=2 owl=2 bee=6 ant=6 fly=6 spider=8 "
    "octopus=8 snake=0 fish=0"
)
LEGS_ZH = _pairs("猫=4 狗=4 马=4 牛=4 羊=4 老虎=4 大象=4 鸟=2 鸭子=2 鸡=2 蜜蜂=6 蚂蚁=6 蜘蛛=8 蛇=0 鱼=0")
# smallest first
SIZES = words("ant bee frog mouse bird duck rabbit cat dog sheep pig tiger bear horse cow elephant whale")
SIZES_ZH = words("蚂蚁 蜜蜂 青蛙 老鼠 鸭子 兔子 猫 狗 羊 猪 老虎 熊 马 牛 大象 鲸鱼")

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAYS_ZH = words("星期一 星期二 星期三 星期四 星期五 星期六 星期日")
MONTHS = words("January February March April May June July August September October November December")
MONTHS_ZH = words("一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月")

BOYS = words("Tom Ben Max Sam Leo Jack Tim Bob Dan Peter Finn Hugo")
GIRLS = words("Lily Anna Mia Lucy Emma Rose Ella Amy Nora Sue Kate Zoe")
NAMES_ZH = words("小明 小红 乐乐 豆豆 圆圆 东东 苗苗 阿宝 天天 朵朵 丁丁 安安")
HEROES = words(
    "cat dog bird rabbit mouse bear fox frog duck turtle monkey pig horse boy girl robot tiger panda owl bee"
)
HEROES_ZH = words(
    "小猫 小狗 小鸟 小兔 小老鼠 小熊 小狐狸 小青蛙 小鸭子 小乌龟 "
    "小猴子 小猪 小马 小男孩 小女孩 机器人 小老虎 小熊猫 小蜜蜂"
)
