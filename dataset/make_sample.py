"""Write the sample data: true facts about amateur radio, stated and asked about in many wordings.

    python dataset/make_sample.py                     # into the folder of this script
    python dataset/make_sample.py --out /tmp/sample --seed 7

It writes three files, the same bytes for the same seed:

    sample_pretrain.txt    running text; every document is `<|bos|>text<|eos|>` and starts a new line
    sample_sft.jsonl       {"question": ..., "answer": ...}, or {"messages": [...]} for a conversation
    sample_heldout.jsonl   questions in wordings that occur in neither file above; their answers do occur

To add a family of facts, append one `Family` to FAMILIES. Its texts are templates: `{field}` is a field of
the fact, `[a|b]` is a choice that is made again each time, and " / " or a new line separates templates.

Sources: ICAO Annex 10 (spelling alphabet), ITU-R M.1677 (Morse code), ITU-R M.1172 and amateur
practice (Q codes, abbreviations), the ITU Radio Regulations for region 3 as China applies them (bands), the
ITU call sign series (prefixes), the ARRL's wording of the RST system (signal reports).
"""

import json
import os
import random
import re
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for config.py

from flags import Parser
from script import InputError, atomic_write, run_script

TEXT_BYTES = 1_700_000  # the length of the pretraining text, to within one document
ENGLISH_SHARE = 0.12  # of the documents
PAIRS = {False: 15, True: 9}  # training questions for a fact in one direction: in Chinese, in English
POLITE_SHARE = 0.35  # of the questions open with a polite word
CONVERSATION_SHARE = 0.15  # of the training rows that are not too long for it
FOLLOW_UP_SHARE = 0.4  # of the further turns in a conversation
CONVERSATION_TOKENS = 120  # at most, so that it fits a context of 128
HELD_OUT_SHARE = 0.55  # of the facts of one direction that are asked in a held-out wording

LETTERS = """A .- Alfa, B -... Bravo, C -.-. Charlie, D -.. Delta, E . Echo, F ..-. Foxtrot, G --. Golf,
    H .... Hotel, I .. India, J .--- Juliett, K -.- Kilo, L .-.. Lima, M -- Mike, N -. November, O --- Oscar,
    P .--. Papa, Q --.- Quebec, R .-. Romeo, S ... Sierra, T - Tango, U ..- Uniform, V ...- Victor,
    W .-- Whiskey, X -..- X-ray, Y -.-- Yankee, Z --.. Zulu"""
DIGITS = "0 -----, 1 .----, 2 ..---, 3 ...--, 4 ....-, 5 ....., 6 -...., 7 --..., 8 ---.., 9 ----."
Q_CODES = """QRG 准确频率 exact frequency, QRK 信号可辨度 readability of signals, QRL 我正忙 I am busy,
    QRM 受到他台干扰 interference from other stations, QRN 受到天电干扰 interference from static,
    QRO 增大发射功率 increase power, QRP 减小发射功率 decrease power, QRQ 发快一些 send faster,
    QRS 发慢一些 send more slowly, QRT 停止发送 stop sending, QRU 没有电报给你 I have nothing for you,
    QRV 准备好了 I am ready, QRX 稍后再呼叫你 I will call you again, QRZ 谁在呼叫我 who is calling me,
    QSA 信号强度 strength of signals, QSB 信号有衰落 signals are fading, QSL 确认收到 I acknowledge receipt,
    QSO 直接通联 direct contact, QSP 代为转发 relay a message, QSY 改换频率 change frequency,
    QTH 电台位置 station location, QTR 准确时间 exact time"""
BANDS = """160米 中频MF 1.8-2.0 MHz, 80米 高频HF 3.5-3.9 MHz, 40米 高频HF 7.0-7.2 MHz,
    30米 高频HF 10.1-10.15 MHz, 20米 高频HF 14.0-14.35 MHz, 17米 高频HF 18.068-18.168 MHz,
    15米 高频HF 21.0-21.45 MHz, 12米 高频HF 24.89-24.99 MHz, 10米 高频HF 28.0-29.7 MHz,
    6米 甚高频VHF 50-54 MHz, 2米 甚高频VHF 144-148 MHz, 70厘米 特高频UHF 430-440 MHz,
    23厘米 特高频UHF 1240-1300 MHz, 13厘米 特高频UHF 2300-2450 MHz"""
PREFIXES = """B 中国, JA 日本, HL 韩国, VU 印度, HS 泰国, TA 土耳其, VK 澳大利亚, ZL 新西兰, K 美国,
    VE 加拿大, XE 墨西哥, PY 巴西, LU 阿根廷, CE 智利, ZS 南非, UA 俄罗斯, G 英格兰, F 法国, DL 德国,
    I 意大利, EA 西班牙, CT 葡萄牙, ON 比利时, PA 荷兰, OZ 丹麦, SM 瑞典, LA 挪威, OH 芬兰, SP 波兰,
    OK 捷克, HA 匈牙利, OE 奥地利"""
REPORTS = """R1 可辨度 无法辨认, R2 可辨度 勉强可辨，只能听出个别词, R3 可辨度 辨认相当困难,
    R4 可辨度 辨认几乎没有困难, R5 可辨度 完全可辨, S1 信号强度 信号微弱，刚能察觉, S2 信号强度 信号非常弱,
    S3 信号强度 信号弱, S4 信号强度 信号尚可, S5 信号强度 信号较好, S6 信号强度 信号好,
    S7 信号强度 信号中等强, S8 信号强度 信号强, S9 信号强度 信号非常强, T1 音调 极粗糙的低频交流声,
    T2 音调 很粗糙的交流声, T3 音调 粗糙，整流但没有滤波, T4 音调 粗糙，略有滤波, T5 音调 已滤波，纹波很强,
    T6 音调 已滤波，纹波明显, T7 音调 接近纯正，有纹波, T8 音调 接近完美，略有纹波, T9 音调 完美，没有纹波"""
ABBREVIATIONS = """CQ 呼叫所有电台, DE 这里是, K 请发送, AR 电文结束, SK 通联结束, 73 致以问候, 88 爱与吻,
    TNX 谢谢, PSE 请, UR 你的, RPT 重复, OM 老朋友, YL 女操作员, XYL 妻子, ANT 天线, PWR 功率, WX 天气,
    FB 很好, GM 早上好, GE 晚上好, AGN 再一次, DX 远距离, ES 和, CUL 稍后再见"""
KILOHERTZ = """1840 1.84, 3573 3.573, 3850 3.85, 7050 7.05, 7074 7.074, 10136 10.136, 14270 14.27, 18100 18.1,
    21400 21.4, 29600 29.6"""
WAVELENGTHS = "1 300, 1.5 200, 2 150, 3 100, 5 60, 6 50, 10 30, 15 20, 30 10, 75 4, 100 3, 150 2"
POWERS = "0 1 mW, 10 10 mW, 20 100 mW, 30 1 W, 33 2 W, 37 5 W, 40 10 W, 43 20 W, 47 50 W, 50 100 W"
DECIBELS = "3 2, 6 4, 7 5, 10 10, 13 20, 17 50, 20 100, 30 1000"
WORDS = """RADIO NANO SIGNAL ANTENNA QUARTZ JUPITER FOX ZERO WAVE KEY VOLT BAND POWER MORSE NOISE HAM TUNE
    DIPOLE COPY WATCH GRID MIXER YAGI LOUD JAZZ QUICK BOX HELP STORM VIEW CHIP FLAG DUST CALL""".split()
SPEAKERS = {False: ["小李 老王", "甲 乙", "学员 教员", "新手 老手"], True: ["Tom Ann", "Ben Kate", "A B"]}
TITLES = {False: ["{}", "{}简介", "认识{}", "学习笔记：{}", "{}常识", "今天的话题是{}", "再谈{}"],
          True: ["{}", "Notes on {}", "About {}", "Lesson: {}"]}
POLITE = ["请问", "请问一下，", "你好，", "你好，请问", "想问一下，", "老师，"]
POLITE_ORDER = ["请", "麻烦", "你好，请"]  # before an imperative, where 请问 would be no Chinese
POLITE_EN = ["Hello, ", "Excuse me, "]
ORDERS = ("告诉我", "说说", "写出", "把", "解释一下", "Tell", "Say", "Send", "Write", "Explain")
# Questions that can be asked for anything that has a name; each `Ask` adds wordings of its own.
FRAMES = "告诉我{} / 说说{} / 你知道{}吗 / {}是什么 / 谁知道{} / 能说出{}吗"
FRAMES_EN = "What is {} / Tell me {} / Do you know {} / Can you tell me {}"


@dataclass(frozen=True)
class Ask:
    """One direction in which facts are asked. The first field in `answer` is what the question names."""

    answer: str  # the one right answer: exact match is then a fair score
    noun: str  # what is asked for, to be put into FRAMES
    train: str  # further wordings
    held: str = ""  # wordings kept back, for every fact of the family
    english: bool = False
    polite: bool = True  # may the question open with 请问 and the like?

    def questions(self):
        """The templates of the training questions."""
        frames = forms(FRAMES_EN if self.english else FRAMES) if self.noun else []
        return [frame.replace("{}", self.noun) for frame in frames] + forms(self.train)


@dataclass(frozen=True)
class Family:
    """Facts of one kind, and the wordings that state them and ask for them."""

    title: str
    intro: str
    facts: list  # of {field: value}
    row: str  # the fact as a line of a list
    tell: str
    asks: list
    title_en: str = ""
    tell_en: str = ""  # empty where the family is told in Chinese alone


def table(fields, text):
    """Facts from `text`: commas separate entries, spaces separate fields; the last field is the rest."""
    names = fields.split()
    entries = [entry.split(maxsplit=len(names) - 1) for entry in re.split(r",\s+", text)]
    return [dict(zip(names, entry, strict=True)) for entry in entries]


def forms(templates):
    """The templates in a text, separated by " / " or new lines."""
    return [form.strip() for form in re.split(r" / |\n", templates) if form.strip()]


def conversion(known, unit, answer):
    """The `Ask` for a quantity in another unit."""
    train = f"""{known}[等于|是|合]多少{unit} / {known}换算一下是多少{unit} / 算一算，{known}是多少{unit}
        多少{unit}等于{known} / {known}写成多少{unit} / 换算{known}，[结果|得数]是多少{unit}
        {known}相当于多少{unit} / 手册上写着{known}，[合|就是]多少{unit} / 仪表显示{known}，等于多少{unit}"""
    held = f"仪表显示{known}，换算出来是多少{unit} / {known}换算一下等于多少{unit}"
    return Ask(answer, f"{known}换算的结果", train, held)


ALPHABET = table("letter code word", LETTERS)
MORSE = [{"char": fact["letter"], "code": fact["code"]} for fact in ALPHABET] + table("char code", DIGITS)
BAND, PREFIX = table("band cls range", BANDS), table("prefix country", PREFIXES)
RST, ABBREVIATION = table("item kind meaning", REPORTS), table("abbr zh", ABBREVIATIONS)
FAMILIES = [
    Family(
        "字母解释法", "通话时单个字母容易听错，所以每个字母都用一个单词来拼读。", ALPHABET, "{letter} {word}",
        """字母{letter}读作{word}，[对方就不容易听错|这是国际通用的读法]。 / {letter}的解释法是{word}。
        在[无线电|业余电台]通话里，[操作员|大家]把{letter}念成{word}。
        {word}[是|就是]字母{letter}的拼读单词。 / 拼读呼号的时候，遇到{letter}就说{word}。
        听到{word}，就[在日志里|]写下字母{letter}。 / 解释法用{word}表示{letter}，{word}也只表示{letter}。""",
        [Ask("字母{letter}读作{word}。", "字母{letter}的[读法|拼读单词]",
             """字母{letter}[怎么读|怎么念|怎么拼读] / {letter}在无线电里[怎么读|怎么说]
             {letter}用哪个单词[来拼读|表示] / 通话时字母{letter}[该怎么说|用哪个词]
             解释法里{letter}[读作什么|是什么] / 报呼号时{letter}[读成|读作]什么
             字母{letter}对应[哪个|什么]单词 / 拼读{letter}时[说|用]什么[词|单词]""",
             "通话时{letter}读作哪个单词 / 报呼号时字母{letter}怎么说 / 解释法里字母{letter}用什么词"),
         Ask("{word}代表字母{letter}。", "{word}代表的字母",
             """{word}代表[哪个|什么]字母 / {word}是哪个字母[|的读法] / 听到{word}[应该|要]写下[哪个|什么]字母
             [无线电|通话]里的{word}[是|指]哪个字母 / {word}对应[哪个|什么]字母 / 呼号里读{word}是什么字母
             单词{word}拼读的是什么字母 / 对方说{word}，指的是什么字母 / 解释法中{word}[表示|代表]哪个字母""",
             "对方念{word}指的是哪个字母 / 解释法里单词{word}是什么字母 / 呼号里听到{word}要写什么字母"),
         Ask("{letter} is {word}.", "the [phonetic|code] word for {letter}",
             """How do you [say|spell] {letter} on the radio / [What|Which] word stands for {letter}
             How is {letter} [said|spelled] on the air / What is {letter} in the phonetic alphabet
             Which word is used for the letter {letter} / How do I say the letter {letter}""",
             "How do you say the letter {letter} on the air / Which phonetic word is {letter}", True)],
        "the spelling alphabet",
        """The letter {letter} is [said|spelled] as {word} on the [air|radio]. / Say {word} for {letter}.
        {word} stands for {letter}. / In the phonetic alphabet {letter} is {word}."""),
    Family(
        "摩尔斯电码", "电码由点和划组成，点写成 . ，划写成 - ，划长是点的三倍。", MORSE, "{char} {code}",
        """[在摩尔斯电码里|发报的时候]，{char}写作{code}，不能多也不能少。 / {char}由{code}这几个点划组成。
        电码{code}[就是|代表]{char}。 / 听到{code}，[就抄下|就写]{char}。 / 要发{char}，就在电键上打{code}。
        {char}的点划是{code}。 / 字符{char}的摩尔斯电码是{code}。 / 点划{code}翻译成{char}。""",
        [Ask("{char}的电码是{code}。", "{char}的[电码|摩尔斯电码|点划]",
             """{char}[怎么发报|用电码怎么发] / {char}的电码怎么[写|打|发] / 摩尔斯电码里{char}[是什么|怎么写]
             用摩尔斯电码[怎么发|怎么打|怎么表示]{char} / 写出{char}的[电码|摩尔斯电码] / {char}对应什么电码
             发报时{char}怎么打 / {char}由哪些点划[组成|表示] / [电键上|用电键]{char}[怎么打|怎么发]""",
             "发报时{char}用哪些点划表示 / 用电键怎么发{char} / 摩尔斯电码里{char}对应什么点划"),
         Ask("{code}代表{char}。", "{code}代表的字符",
             """电码{code}[代表|表示]什么 / {code}[是|代表|表示][哪个|什么]字符 / 点划{code}[代表|对应]什么
             摩尔斯电码{code}[是什么|代表什么] / [听到|收到]{code}[是哪个字符|该抄下什么] / {code}对应哪个字符
             抄报时{code}[记作|写成]什么 / 把{code}翻译成字符 / 电键发出{code}[是什么|是哪个字符]""",
             "收到电码{code}要写成什么 / 抄报时听到{code}代表什么 / 摩尔斯电码{code}对应什么字符"),
         Ask("{char} is {code} in Morse.", "the Morse code for {char}",
             """How do you [send|write] {char} in Morse code / Send {char} in Morse
             How is {char} sent in Morse / Which dots and dashes are {char} / What is {char} in Morse [|code]
             Write {char} in Morse [|code] / What are the dots and dashes for {char}""",
             "How is {char} written in Morse code / Tell me the dots and dashes for {char}", True)],
        "Morse code",
        """In Morse code {char} is sent as {code} on the key. / Send {code} for {char}.
        The code {code} stands for {char}. / The dots and dashes {code} mean {char}."""),
    Family(
        "Q简语", "Q简语由三个字母组成，第一个总是Q，后面加上问号就变成提问。",
        table("code zh en", Q_CODES), "{code} {zh}",
        """{code}的含义是{zh}。 / Q简语{code}用来表示{zh}，[电报和话音里都用|各国操作员都懂]。
        想说{zh}，就发{code}。 / [通联|通话]中对方发来{code}，意思就是{zh}。 / {zh}，用Q简语说就是{code}。
        操作员用{code}代替“{zh}”。 / {code}这个Q简语[指|表示]{zh}。 / 表达{zh}的Q简语是{code}。""",
        [Ask("{code}的意思是{zh}。", "{code}的[含义|意思]",
             """{code}是什么意思 / {code}[代表|表示]什么 / Q简语{code}[是什么意思|的含义是什么]
             业余电台说的{code}指什么 / [通联|通话]中听到{code}[是什么意思|表示什么] / 解释一下[|Q简语]{code}
             对方发{code}[是想说什么|是什么意思] / Q简语里的{code}[指什么|怎么解释]
             {code}这个Q简语怎么[理解|解释] / 收到{code}[该怎么理解|说明什么]""",
             "Q简语{code}怎么理解 / 通联中对方发{code}说明什么 / 业余电台里听到{code}指什么"),
         Ask("{zh}用{code}表示。", "[表示|代表]{zh}的Q简语",
             """哪个Q简语[表示|代表]{zh} / [表示|想说]{zh}用[哪个|什么]Q简语 / {zh}用Q简语怎么[说|表示]
             用Q简语怎么[说|表达]{zh} / 要表达{zh}[该发什么|发哪个]Q简语 / {zh}对应[哪个|什么]Q简语
             {zh}应该发哪个Q简语 / 通联中{zh}[用|发]什么Q简语 / 写出{zh}的Q简语""",
             "想表达{zh}用什么Q简语 / 通联时要说{zh}发哪个Q简语 / 哪个Q简语的意思是{zh}"),
         Ask("{code} means {en}.", "the meaning of {code}",
             """What does {code} mean / Tell me what {code} means / Do you know what {code} means
             What does the Q code {code} [mean|stand for] / Explain [|the Q code] {code}
             What does {code} mean on the [air|radio] / What do operators mean by {code}""",
             "What is the meaning of the Q code {code} / What do you mean by {code} on the air", True)],
        "Q codes", 'The Q code {code} means {en}. / Operators send {code} for "{en}".'),
    Family(
        "业余波段", "波段用大约的波长来称呼，电台只能在规定的频率范围里发射。", BAND, "{band}波段 {range}",
        """业余{band}波段的频率范围是{range}。 / {band}波段是{range}，属于{cls}。 / {band}波段算{cls}。
        频率{range}叫作{band}波段。 / 在[中国|我国]，{band}波段[可以用|覆盖]{range}。
        {range}这段频率就是{band}波段。 / {cls}里有{band}波段，频率是{range}。""",
        [Ask("{band}波段是{range}。", "{band}波段的[频率|频率范围]",
             """{band}波段[在什么频率|是多少兆赫] / {band}波段从多少到多少[|MHz] / 业余{band}波段在什么频率
             业余{band}波段的频率范围是多少 / 业余电台的{band}波段是哪段频率 / {band}波段[包括|覆盖]哪些频率
             {band}波段的[起止频率|上下限]是多少 / 在{band}波段[可以用哪些频率|能用什么频率]""",
             "业余{band}波段覆盖什么频率 / 说说业余{band}波段的起止频率 / {band}波段可以用哪段频率"),
         Ask("{range}属于{band}波段。", "{range}所在的波段",
             """{range}是哪个波段 / {range}[属于|对应]哪个[业余波段|波段] / 频率{range}[叫什么|是什么]波段
             {range}这段频率[是哪个波段|叫什么] / 哪个波段[是|覆盖]{range} / 频率范围{range}是哪个业余波段
             业余电台里{range}叫什么波段 / {range}在哪个[波段|业余波段]里 / 哪个波段的频率是{range}""",
             "哪个业余波段的频率范围是{range} / {range}这段频率属于什么波段"),
         Ask("{band}波段属于{cls}。", "{band}波段所属的频段",
             """{band}波段属于[哪个|什么]频段 / {band}波段[归|算|划在]哪个频段 / {band}波段是什么频段
             业余{band}波段[属于|算]什么频段 / {band}波段在哪个频段里 / 按频段划分，{band}波段算什么""",
             "业余{band}波段划在什么频段 / 按频段划分，{band}波段属于什么")]),
    Family(
        "呼号前缀", "前缀说明电台属于哪里。一个国家可以有多个，这里只记一个。", PREFIX, "{prefix} {country}",
        """以{prefix}开头的[呼号|电台]来自{country}。 / 听到{prefix}打头的呼号，就知道对方在{country}。
        呼号前缀{prefix}[代表|属于]{country}。 / {country}的[业余电台|电台]常用{prefix}作前缀。
        前缀{prefix}分给了{country}。 / 日志里{prefix}开头的呼号，是{country}的电台。""",
        [Ask("{prefix}是{country}的前缀。", "前缀{prefix}代表的国家",
             """{prefix}是哪个国家的[呼号|]前缀 / 呼号前缀{prefix}[属于|代表]哪个国家 / 前缀{prefix}是哪国的
             {prefix}开头的呼号[来自哪个国家|是哪国的] / 听到{prefix}开头的电台[是哪国的|来自哪里]
             以{prefix}开头的电台在哪个国家 / {prefix}这个前缀[对应|代表]哪个国家 / {prefix}打头的呼号来自哪里
             呼号以{prefix}开头[是哪个国家|来自哪里] / 日志里{prefix}开头的呼号是哪国的""",
             "呼号前缀{prefix}来自哪里 / 听到以{prefix}打头的呼号是哪国的 / 日志里的前缀{prefix}属于哪国"),
         Ask("{country}的常用前缀是{prefix}。", "{country}的[前缀|呼号前缀|常用前缀]",
             """{country}电台的呼号[用什么开头|以什么开头] / {country}用[什么|哪个]前缀
             哪个前缀[代表|属于|表示]{country} / {country}业余电台用什么[前缀|呼号前缀]
             {country}的电台[用哪个前缀|前缀是什么] / 来自{country}的呼号[怎么开头|以什么打头]""",
             "{country}业余电台的呼号怎么开头 / 来自{country}的电台以什么打头 / 哪个呼号前缀属于{country}")]),
    Family(
        "RST信号报告", "报告依次给出可辨度R、信号强度S和音调T，话音通联只报前两个。", RST, "{item} {meaning}",
        """信号报告里，{item}[说明|表示]{meaning}。 / {kind}{item}：{meaning}。 / {item}的含义是{meaning}。
        {kind}为{item}，就是{meaning}。 / 报{item}，是说{meaning}。 / 对方给出{item}，意思是{meaning}。""",
        [Ask("{item}表示{meaning}。", "{item}的[含义|意思]",
             """{item}是什么意思 / 信号报告{item}[表示什么|是什么意思] / RST里的{item}[表示|说明]什么
             {kind}{item}[表示什么|怎么理解] / 对方给我{item}[是什么意思|说明什么] / 解释一下[|信号报告]{item}
             RST报告中{item}怎么[理解|解释] / 收到{item}的报告是什么意思 / {kind}为{item}是什么意思""",
             "信号报告里的{item}怎么理解 / 对方给的{kind}{item}说明什么 / 收到{kind}{item}的报告怎么解释")]),
    Family(
        "电报缩写", "电报一个字符一个字符地发，所以操作员爱用缩写。", ABBREVIATION, "{abbr} {zh}",
        """电报里{abbr}[表示|就是]{zh}。 / 缩写{abbr}的含义是{zh}。 / 操作员用{abbr}代替“{zh}”。
        CW通联中{abbr}指{zh}。 / 想说“{zh}”，电报里发{abbr}。 / “{zh}”的缩写是{abbr}。""",
        [Ask("{abbr}的意思是{zh}。", "[缩写|电报缩写]{abbr}的[含义|意思]",
             """电报缩写{abbr}是什么意思 / {abbr}在电报里[表示|代表]什么 / 缩写{abbr}指什么 / {abbr}是什么意思
             CW中的{abbr}[是什么意思|怎么理解] / {abbr}是什么的缩写 / 发报时{abbr}[表示什么|是什么意思]
             电报里的{abbr}[指什么|怎么解释] / 抄到{abbr}[指什么|该怎么理解] / 解释一下缩写{abbr}""",
             "发报时缩写{abbr}怎么理解 / 电报里抄到{abbr}表示什么 / CW中的缩写{abbr}怎么解释")]),
    Family(
        "千赫和兆赫", "1 MHz等于1000 kHz。", table("khz mhz", KILOHERTZ), "{khz} kHz = {mhz} MHz",
        """频率{khz} kHz也写成{mhz} MHz。 / {mhz} MHz[换算成|就是]{khz} kHz。 / {khz}千赫等于{mhz}兆赫。
        把{khz} kHz除以1000，得到{mhz} MHz。 / 把{mhz} MHz乘以1000，得到{khz} kHz。""",
        [conversion("{khz} kHz", "MHz", "{khz} kHz等于{mhz} MHz。"),
         conversion("{mhz} MHz", "kHz", "{mhz} MHz等于{khz} kHz。")],
        "kilohertz and megahertz", "{khz} kHz is {mhz} MHz. / {mhz} MHz [is|equals] {khz} kHz."),
    Family(
        "频率和波长", "波长的米数约等于300除以频率的兆赫数。",
        table("mhz metres", WAVELENGTHS), "{mhz} MHz {metres}米",
        """频率{mhz} MHz，波长约{metres}米。 / 300除以{mhz}得{metres}，所以{mhz} MHz的电波长约{metres}米。
        {mhz}兆赫的[电波|无线电波]，波长大约是{metres}米。 / 波长{metres}米对应{mhz} MHz。""",
        [Ask("{mhz} MHz的波长约{metres}米。", "{mhz} MHz的波长",
             """{mhz} MHz的波长[是多少|约多少米] / {mhz} MHz对应多长的波长 / 频率{mhz} MHz的波长[多长|是多少]
             {mhz}兆赫的[波长是多少|电波有多长] / {mhz} MHz的无线电波有多长 / {mhz} MHz换算成波长是多少米""",
             "频率{mhz} MHz的电波有多长 / {mhz}兆赫对应多少米的波长")],
        "frequency and wavelength",
        "The wavelength of {mhz} MHz is about {metres} m. / A wave of {mhz} MHz is about {metres} m long."),
    Family(
        "功率和dBm", "0 dBm就是1 mW，下面的数取整。", table("dbm power", POWERS), "{power} = {dbm} dBm",
        """功率{power}[就是|写成]{dbm} dBm。 / {dbm} dBm的发射功率是{power}。
        电台输出{power}，也就是{dbm} dBm。 / 功率计读出{dbm} dBm，说明有{power}。""",
        [conversion("{power}", "dBm", "{power}相当于{dbm} dBm。"),
         conversion("{dbm} dBm", "瓦", "{dbm} dBm相当于{power}。")],
        "power and dBm", "{power} is {dbm} dBm. / {dbm} dBm [is|means] {power}."),
    Family(
        "分贝和倍数", "分贝用对数表示功率的倍数，下面的数取整。", table("db ratio", DECIBELS),
        "{db} dB {ratio}倍",
        """功率增加{db} dB，就是变成{ratio}倍。 / 增益{db} dB的放大器把功率放大{ratio}倍。
        {db}分贝对应的功率比是{ratio}。 / 功率变成{ratio}倍，就是增加{db} dB。""",
        [conversion("{db} dB", "倍", "{db} dB相当于功率{ratio}倍。"),
         conversion("功率{ratio}倍", "dB", "功率{ratio}倍相当于{db} dB。")],
        "decibels", "A gain of {db} dB is {ratio} times the power. / {ratio} times the power is {db} dB."),
    Family(
        "Nano", "Nano从零开始学会了说话。", [{}], "Nano 小语言模型",
        "Nano是一个从零训练的小语言模型。 / Nano只懂业余无线电的小知识。 / Nano自我介绍：我是小语言模型。",
        [Ask("我是Nano，一个从零训练的小语言模型。", "你的名字",
             "你是谁 / 你是什么[模型|] / 你叫什么[名字|] / 介绍一下你自己 / 能说说你是谁吗",
             "说说你自己是谁 / 你的名字叫什么"),
         Ask("我会回答业余无线电的小问题。", "你会[做|回答]的事",
             "你会[做什么|什么] / 你能[做什么|做些什么] / 你[知道|懂]些什么 / 我可以问你什么",
             "你会做些什么事 / 你会回答哪些问题"),
         Ask("你好，我是Nano。", "", "你好 / 您好 / 嗨 / 你好呀 / 你好，Nano / 嗨，Nano", polite=False),
         Ask("不客气，73！", "", "谢谢 / 谢谢你 / 多谢 / 谢谢你的回答 / 非常感谢 / 谢谢，Nano", polite=False),
         Ask("I am Nano, a small language model.", "your name", "Who are you / What are you",
             "Tell me who you are", True)],
        "Nano", "Nano is a small language model. / Nano knows a little about amateur radio."),
]


def deck(rng, items):
    """Yield `items` in random order, again and again: each occurs equally often."""
    while True:
        yield from rng.sample(items, len(items))


def fill(rng, template, fact):
    """The template with its choices made and its fields filled in from the fact."""
    chosen = re.sub(r"\[(.*?)\]", lambda choice: rng.choice(choice[1].split("|")), template)
    return chosen.format(**fact).strip()


def decorate(rng, question, ask):
    """The question as different people would ask it: politely or not, with or without a question mark."""
    order = question.startswith(ORDERS)
    openings, endings = POLITE, ["", "？"] if question.endswith("吗") else ["", "？", "呢", "呢？"]
    if not ask.polite:
        openings, endings = [""], ["", "！", "。"]
    elif ask.english:
        openings, endings = POLITE_EN, ["", "."] if order else ["", "?"]
    elif order:
        openings, endings = POLITE_ORDER, ["", "。"]
    if rng.random() < POLITE_SHARE:
        question = rng.choice(openings) + (question[0].lower() + question[1:] if ask.english else question)
    return question + rng.choice(endings)


def follow_up(rng, ask, fact):
    """`那C呢`: a question that only the one before it makes clear."""
    key = fact[re.search(r"{(\w+)}", ask.answer)[1]]
    return f"And {key}?" if ask.english else f"那{key}呢" + rng.choice(["", "？"])


def normalise(text):
    """`text` in lower case without polite words, particles, spaces and marks: the core of a question."""
    marks = r"[，。？！：；、“”?!, ]|(?<=[a-z])\.$"
    bare = core = re.sub(marks, "", text.lower())
    for polite in sorted(POLITE + POLITE_ORDER + POLITE_EN, key=len, reverse=True):
        core = core.replace(re.sub(marks, "", polite.lower()), "")
    return core.removesuffix("呢") or bare


# Running text. A kind of document is a function (rng, family, facts, english) -> text.


def sentences(rng, family, facts, english):
    """A sentence on each fact. The answers of the questions are among the wordings, as SFT asks for them."""
    tell = forms(family.tell_en if english else family.tell)
    tell += [ask.answer for ask in family.asks if ask.english == english and "{" in ask.answer]
    return [fill(rng, rng.choice(tell), fact) for fact in facts]


def article(rng, family, facts, english):
    """A title and the facts as running text, as numbered points or as a bare list."""
    head = rng.choice(TITLES[english]).format(family.title_en if english else family.title)
    layout = rng.choice(["text", "text", "points", "list"])
    if layout == "list":
        return "\n".join([head] + [family.row.format(**fact) for fact in facts])
    told = sentences(rng, family, facts, english)
    intro = [family.intro] if not english and rng.random() < 0.5 else []
    if layout == "points":
        told = [f"{number}. {sentence}" for number, sentence in enumerate(told, 1)]
        return "\n".join([head] + intro + told)
    return head + "\n" + (" " if english else "").join(intro + told)


def comparison(rng, family, facts, english):
    """Two facts against each other."""
    one, two = sentences(rng, family, facts[:2], english)
    if english:
        return f"Do not mix them up. {one} {two}"
    joined = rng.choice(["比较一下：{}，而{}", "两者不同，{}；{}", "不要弄混：{}，{}", "{}；{}"])
    return joined.format(one.removesuffix("。"), two)


def dialogue(rng, family, facts, english):
    """Questions, in the wordings of the training set, and their answers."""
    asks = [ask for ask in family.asks if ask.english == english]
    if not asks:
        return article(rng, family, facts, english)
    asker, knower = rng.choice(SPEAKERS[english]).split()
    colon, lines, ask = ": " if english else "：", [], rng.choice(asks)
    for fact in facts[:5]:
        if lines and rng.random() < 0.2:
            question = follow_up(rng, ask, fact)
        else:
            ask = rng.choice(asks)
            question = decorate(rng, fill(rng, rng.choice(ask.questions()), fact), ask)
        lines += [f"{asker}{colon}{question}", f"{knower}{colon}{ask.answer.format(**fact)}"]
    return "\n".join(lines)


def spelled(word):
    """The word in the spelling alphabet; digits stay as they are."""
    words = {fact["letter"]: fact["word"] for fact in ALPHABET}
    return " ".join(words.get(character, character) for character in word)


def spelling(rng, word):
    """A word letter by letter, in the spelling alphabet or in Morse code."""
    codes = {fact["char"]: fact["code"] for fact in MORSE}
    return rng.choice([
        f"{word}拼读为{spelled(word)}。",
        f"逐个字母拼读{word}：" + "，".join(f"{letter}是{spelled(letter)}" for letter in word) + "。",
        f"{word}的电码是" + " ".join(codes[letter] for letter in word) + " 。",
        f"用电码发{word}：" + "，".join(f"{letter}的电码是{codes[letter]}" for letter in word) + "。",
        "抄报：" + "，".join(f"{codes[letter]}代表{letter}" for letter in word) + f"，合起来是{word}。",
    ])


def contact(rng):
    """A contact between two stations, as a log entry or as spoken."""
    band, prefix, abbreviation = (rng.choice(facts) for facts in (BAND, PREFIX, ABBREVIATION))
    low, high = (round(float(edge) * 1000) for edge in band["range"].removesuffix(" MHz").split("-"))
    frequency = f"{rng.randint(low, high) / 1000:.7g} MHz"
    mine, call = (start + str(rng.randint(1, 9)) + "".join(fact["letter"] for fact in rng.sample(ALPHABET, 3))
                  for start in ("BG", {"B": "BD"}.get(prefix["prefix"], prefix["prefix"])))
    log = rng.random() < 0.5 or band["band"] == "30米"  # a band without voice
    kinds = "RST" if log else "RS"
    report = [rng.choice([fact for fact in RST if fact["item"][0] == kind]) for kind in kinds]
    digits = "".join(fact["item"][1] for fact in report)
    meanings = "；".join("{item}表示{meaning}".format(**fact) for fact in report)
    if log:
        return (f"通联日志\n频率：{frequency}，{band['band']}波段，属于{band['cls']}\n"
                f"呼号：{call}，拼读为{spelled(call)}\n"
                f"来自：{prefix['country']}，常用前缀是{prefix['prefix']}\n信号报告：{digits}。{meanings}。")
    return (f"{mine}：CQ CQ CQ，这里是{mine}，{spelled(mine)}，频率{frequency}，请回答。\n"
            f"{call}：{mine}，这里是{call}，{spelled(call)}，QTH是{prefix['country']}，你的信号是{digits}。\n"
            f"{mine}：QSL，{digits}，就是{meanings}。{band['band']}波段今天很好。\n"
            f"{call}：谢谢，73。对了，{abbreviation['abbr']}的意思是{abbreviation['zh']}。")


def document(rng):
    """A document of a random kind; families with more questions get more documents."""
    chance = rng.random()
    if chance < 0.05:
        return contact(rng)
    if chance < 0.12:
        return spelling(rng, rng.choice(WORDS))
    english = rng.random() < ENGLISH_SHARE
    told = [family for family in FAMILIES if family.tell_en or not english]
    family = rng.choices(told, [(2 + len(family.facts)) * (1 + len(family.asks)) for family in told])[0]
    facts = rng.sample(family.facts, min(rng.randint(4, 8), len(family.facts)))
    kinds = [article, article, comparison, dialogue, dialogue] if len(facts) > 1 else [article, dialogue]
    return rng.choice(kinds)(rng, family, facts, english)


def pretraining_lines(rng):
    """Lines of marked documents, TEXT_BYTES of them in total."""
    lines, size = [], 0
    while size < TEXT_BYTES:
        lines.append(f"<|bos|>{document(rng)}<|eos|>\n")
        size += len(lines[-1].encode("utf-8"))
    return lines


# Questions and answers.


def training_pairs(rng, ask, facts):
    """PAIRS different (question, answer) for every fact; the templates are used equally often."""
    pairs = {}
    for number, fact in enumerate(facts, 1):
        templates = deck(rng, ask.questions())
        while len(pairs) < number * PAIRS[ask.english]:
            pairs[decorate(rng, fill(rng, next(templates), fact), ask)] = ask.answer.format(**fact)
    return list(pairs.items())


def held_out_pairs(rng, ask, facts):
    """(question, answer) for a share of the facts, each in one of the held-out wordings."""
    templates = deck(rng, forms(ask.held))
    chosen = rng.sample(facts, max(1, round(len(facts) * HELD_OUT_SHARE))) if ask.held else []
    questions = [decorate(rng, next(templates).format(**fact), ask) for fact in chosen]
    return [(question, ask.answer.format(**fact)) for question, fact in zip(questions, chosen, strict=True)]


def training_rows(rng, ask, facts):
    """Lists of (question, answer): every training pair of `ask`, some joined into conversations with
    follow-up questions."""
    pairs = training_pairs(rng, ask, facts)
    longest = max(tokens([pair]) for pair in pairs)
    rng.shuffle(pairs)
    while pairs:
        turns = [pairs.pop()]
        wanted = rng.randint(2, 3) if rng.random() < CONVERSATION_SHARE else 1
        while pairs and len(turns) < wanted and tokens(turns) + longest <= CONVERSATION_TOKENS:
            if "{" in ask.answer and rng.random() < FOLLOW_UP_SHARE:
                said = [answer for _, answer in turns]
                fact = rng.choice([fact for fact in facts if ask.answer.format(**fact) not in said])
                turns.append((follow_up(rng, ask, fact), ask.answer.format(**fact)))
            else:
                turns.append(pairs.pop())
        yield turns


def tokens(turns):
    """The length of a row in training: its characters and three special tokens a turn."""
    return sum(len(question) + len(answer) + 3 for question, answer in turns)


def row(turns):
    """One line of JSON for one or several turns."""
    if len(turns) == 1:
        content = {"question": turns[0][0], "answer": turns[0][1]}
    else:
        messages = [{"role": role, "content": text}
                    for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        content = {"messages": messages}
    return json.dumps(content, ensure_ascii=False) + "\n"


def write_lines(path, lines):
    """Write the file whole or not at all, with the same bytes on every system. Raises InputError."""
    with atomic_write(path) as file:
        file.writelines(line.encode() for line in lines)


def write_sample(folder, seed=1337):
    """Write the three sample files into `folder`, which is created if it is missing.

    Returns their paths ("pretrain", "sft", "heldout") and counts: "documents", "bytes" of pretraining text,
    "rows" and "conversations" (rows of several turns) of training, "held_out" questions. Raises InputError.
    """
    rng = random.Random(seed)
    asked = [(ask, family.facts) for family in FAMILIES for ask in family.asks]
    text = pretraining_lines(rng)
    rows = [turns for ask, facts in asked for turns in training_rows(rng, ask, facts)]
    held_out = [[pair] for ask, facts in asked for pair in held_out_pairs(rng, ask, facts)]
    rng.shuffle(rows)
    rng.shuffle(held_out)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from None
    paths = {name: os.path.join(folder, f"sample_{name}.{end}") for name, end in
             (("pretrain", "txt"), ("sft", "jsonl"), ("heldout", "jsonl"))}
    write_lines(paths["pretrain"], text)
    write_lines(paths["sft"], map(row, rows))
    write_lines(paths["heldout"], map(row, held_out))
    return paths | {"documents": len(text), "bytes": os.path.getsize(paths["pretrain"]), "rows": len(rows),
                    "conversations": sum(len(turns) > 1 for turns in rows), "held_out": len(held_out)}


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = Parser(__doc__)
    parser.add_argument("--out", default=here, metavar="DIR", help="folder to write into (default: its own)")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed writes the same bytes")
    args = parser.parse_args()
    made = write_sample(args.out, args.seed)
    print(f"{made['pretrain']}: {made['documents']:,} documents, {made['bytes'] / 1e6:.2f} MB")
    print(f"{made['sft']}: {made['rows']:,} rows, {made['conversations']:,} of them conversations")
    print(f"{made['heldout']}: {made['held_out']:,} questions in wordings that training never saw")


if __name__ == "__main__":
    run_script(main)
